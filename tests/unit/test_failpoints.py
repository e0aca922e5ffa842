"""Failpoints: a misspelt one is no silent one."""

from __future__ import annotations

import pytest

from outboxkit import _failpoints


def test_unknown_failpoints_are_refused() -> None:
    with pytest.raises(ValueError, match=r"commit\.befor"):
        _failpoints.enable("commit.befor=exit")
