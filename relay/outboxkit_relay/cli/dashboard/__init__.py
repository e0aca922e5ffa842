"""``outboxkit dashboard``: the page on this machine."""
