"""outboxkit: a transactional outbox and inbox, from the database commit to the handler's effect and back."""
