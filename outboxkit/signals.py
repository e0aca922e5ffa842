"""Signals that a handler raises on purpose: they are no errors, and are not logged as such."""

from __future__ import annotations

from datetime import timedelta

__all__ = [
    "DeadLetterRequested",
    "RetryRequested",
]


class DeadLetterRequested(Exception):
    """The handler says that this message can never be handled."""


class RetryRequested(Exception):
    """The handler wants the message again after a delay; ``is_free`` means that no try is spent."""

    def __init__(self, delay: timedelta, *, is_free: bool = False) -> None:
        super().__init__(f"again after {delay}")
        self.delay, self.is_free = delay, is_free
