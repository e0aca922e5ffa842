"""Observation: what may be known of a running consumer.

- `stats`: numbers, durations and standing as one frozen value, and the rules of readiness
- `order_check`: whether the messages of each key take effect in order
"""
