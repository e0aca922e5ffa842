"""Observation: what people and machines may know of a running relay.

Reading order:

- `stats`: the value that the dispatcher hands out, and the rules of readiness
- `sentences`: what is wrong with a destination, in one line
- `metrics`: the same numbers, and those of the database, for Prometheus
- `health`: ``/livez``, ``/readyz`` and ``/metrics`` over HTTP
"""
