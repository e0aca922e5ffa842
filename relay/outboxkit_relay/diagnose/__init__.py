"""Diagnosis: questions to a database and its brokers, answered without changing anything.

`trace` follows one message, key or conversation through all tables (`steps` reads them, `find_message` the relay's
part). `doctor` examines a set-up by small checks (`postgresql_checks`, `table_checks`, `broker_checks`) over one
`patient`. `audit` counts every message once in one snapshot and names what contradicts itself (`contradictions`).
Commands and pages are drawn from these functions; they hold no payload.
"""
