"""Sagas: a business transaction over several services, each step with what undoes it.

A saga is a class of steps (`declare`). Its instances are rows; what follows an answer, a time-out or an operator's wish
is decided without I/O (`core`) and written by handlers of a consumer (`run`): commands leave through the outbox,
answers come in through the inbox, so a crash anywhere neither repeats nor forgets a step. `store` reads the rows.

    register(Consumer("checkout", sessions=Session), Checkout)
"""

from outboxkit.saga.core import Status
from outboxkit.saga.declare import Saga, pause, started_by, step, wait
from outboxkit.saga.run import compensate, register, resume
from outboxkit.saga.store import SagaRow, count, find, get

__all__ = [
    "Saga",
    "SagaRow",
    "Status",
    "compensate",
    "count",
    "find",
    "get",
    "pause",
    "register",
    "resume",
    "started_by",
    "step",
    "wait",
]
