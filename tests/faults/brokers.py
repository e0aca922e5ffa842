"""Brokers that a test runs on."""

from __future__ import annotations

import pytest

__all__ = ["on_brokers"]

_ALL = ("kafka", "rabbitmq")


def on_brokers(*short: str) -> pytest.MarkDecorator:
    """On these in the short profile, on all of them in the full one."""
    return pytest.mark.parametrize(
        "broker",
        [pytest.param(name, marks=() if name in short else pytest.mark.full) for name in _ALL],
        indirect=True,
    )
