"""Idempotency keys with stored outcomes, for HTTP handlers and jobs.

`keys` holds the block that runs once for each key; `asgi` the middleware that makes answer, effect and key one
transaction. A consumer needs neither: its inbox does the same for messages.
"""

from outboxkit.idempotency.asgi import SESSION, IdempotencyMiddleware
from outboxkit.idempotency.keys import Call, Idempotent, Outcome, idempotent

__all__ = ["SESSION", "Call", "IdempotencyMiddleware", "Idempotent", "Outcome", "idempotent"]
