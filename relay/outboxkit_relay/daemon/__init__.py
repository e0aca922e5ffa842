"""The daemon: carries out what the core decides, with threads, database connections and a publisher.

Reading order:

- `relay`: the dispatcher, which alone touches the core's state
- `reader`, `settler`: the work of the two database threads; `db_thread`: such a thread; `membership`: their lease
- `publishers`: one for each broker, supervised
- `janitor`: deletes what is no longer kept
- `listener`: wakes the dispatcher when writers notify
- `lifecycle`: a patient start, a quick stop
- `build`: a relay from settings; `embedded`: the same inside an application (`outboxkit_relay.Relay`)
"""
