"""The core: decides what a relay does next. Pure: no clock, no I/O, no threads, no SQL.

Reading order:

- `protocol`: events that go in, commands that come out
- `state`: the configuration, and everything a relay knows
- `step`: takes an event in; `planning`: then decides what to do next
- `intake`: rows that were read, settlements on their way; `outcomes`: what follows from a broker's answer
- `flaws`: why a stored row can never be sent
- `lanes`: what has been read; `destinations`: what is queued and in flight for each topic
"""
