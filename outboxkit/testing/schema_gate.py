"""A pytest fixture that fails when a schema file breaks what was released.

In ``conftest.py``::

    from outboxkit.testing.schema_gate import schema_gate  # noqa: F401

and in a test::

    def test_schemas(schema_gate):
        schema_gate("schemas")
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path

import pytest

from outboxkit.avro import Mode
from outboxkit.avro.gate.evaluate import GateResult, evaluate
from outboxkit.avro.gate.reports import render
from outboxkit.registries.directory import DirectoryRegistry

__all__ = ["schema_gate"]

Gate = Callable[..., GateResult]


@pytest.fixture
def schema_gate() -> Gate:
    """The gate as a function: ``schema_gate(folder, mode=None, today=None)`` returns the result or fails the test."""
    return _gate


def _gate(folder: str | Path = "schemas", *, mode: Mode | None = None, today: dt.date | None = None) -> GateResult:
    registry = DirectoryRegistry(Path(folder))
    findings = registry.findings(mode=None if mode is None else lambda _: mode)
    result = evaluate(findings, registry.allowed(), today or dt.datetime.now(dt.UTC).date())
    if not result.passed:
        pytest.fail(render(result, "text"), pytrace=False)
    return result
