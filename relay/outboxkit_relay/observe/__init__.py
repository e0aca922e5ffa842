"""Observation: what people and machines may know of a running relay or consumer.

Reading order:

- `stats`: the value that the dispatcher hands out, and the rules of readiness
- `sentences`: what is wrong with a destination or a consumer, in one line
- `metrics`, `consumer`: the same numbers, and those of the database and of consumers, for Prometheus; `families`: how
- `runs`: who runs which consumer, and what is wrong with it
- `health`: ``/livez``, ``/readyz`` and ``/metrics`` over HTTP
"""
