"""``outboxkit consumer``: what concerns a consumer as a whole."""
