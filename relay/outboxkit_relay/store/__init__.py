"""Store: the relay's SQL."""
