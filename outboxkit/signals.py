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
    """The handler wants the message again after a delay."""

    def __init__(self, delay: timedelta) -> None:
        super().__init__(f"again after {delay}")
        self.delay = delay
