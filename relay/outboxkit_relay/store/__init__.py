"""The store: SQL that only relays need, beside the verbs of `outboxkit.outbox`.

Reading order:

- `leases`: which relay owns which shards
- `stopped_keys`: the waiting room, and keys whose order is held
- `due`: which waiting messages may be published now
- `operator_requests`: what operators asked of stopped keys
- `burial`: dead letters, also of rows that cannot be moved; `mending`: rows that no statement would find
- `reports`: what each relay tells of itself beside its lease
- `retention`: deletes what is no longer kept
"""
