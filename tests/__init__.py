"""The proof: one folder per kind of test, `tests/servers` the real servers they run on."""
