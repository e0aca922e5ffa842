"""Sessions at random against a model in plain Python, on PostgreSQL; and proof that a defect would be noticed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outboxkit.capture import session_hooks
from outboxkit.errors import CaptureError
from tests.integration.capture.machine import CaptureMachine
from tests.integration.capture.world import prepare
from tests.servers.postgres import Templates

pytestmark = pytest.mark.sqlalchemy_lines

RUNS = 2_000 if os.environ.get("OUTBOXKIT_PROFILE") == "full" else 40
STEPS = 50


@pytest.fixture
def engine(templates: Templates) -> Iterator[Engine]:
    for url in templates.lend(prepare):
        found = create_engine(url)
        yield found
        found.dispose()


def run(engine: Engine, runs: int, *phases: Phase) -> None:
    machine = type("Machine", (CaptureMachine,), {"engine": engine})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=runs,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=phases or (Phase.generate, Phase.shrink),
            database=None,
            report_multiple_bugs=False,
        ),
    )


@pytest.mark.timeout(3600)
def test_after_every_commit_the_outbox_holds_exactly_what_survived(engine: Engine) -> None:
    run(engine, RUNS)


# --- the machine itself is tested by defects that it must find ----------------------------------------------------


def buffer_on_session_info(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(transaction: Any) -> Any:
        return transaction and transaction.session.info.setdefault("outbox", session_hooks._Unwritten())

    monkeypatch.setattr(session_hooks, "_unwritten", waiting)
    monkeypatch.setattr(session_hooks, "_found", waiting)


def drain_only_in_before_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def before_flush(session: Session, context: Any, _objects: Any) -> None:
        if waiting := session_hooks._found(session_hooks._current(session)):
            session_hooks._unmark(session, waiting)
            context.attributes["drained"], waiting.emissions = waiting.emissions, []
            if session_hooks._is_clean(session):
                after_flush(session, context)

    def after_flush(session: Session, context: Any) -> None:
        if drained := context.attributes.get("drained"):
            session_hooks._insert(session_hooks._current(session), drained)  # type: ignore[arg-type]

    monkeypatch.setattr(session_hooks, "_LISTENERS", {"before_flush": before_flush, "after_flush": after_flush})


def insert_before_the_domain_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    def before_flush(session: Session, _context: Any, _objects: Any) -> None:
        transaction = session_hooks._current(session)
        if transaction and (waiting := session_hooks._found(transaction)):
            session_hooks._unmark(session, waiting)
            session_hooks._write(session, transaction)

    monkeypatch.setattr(session_hooks, "_LISTENERS", {**session_hooks._LISTENERS, "before_flush": before_flush})


@pytest.mark.parametrize("defect", [buffer_on_session_info, drain_only_in_before_flush, insert_before_the_domain_flush])
def test_the_machine_finds_a_defect(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, defect: Callable[[pytest.MonkeyPatch], None]
) -> None:
    session_hooks.remove()
    try:
        with monkeypatch.context() as patch:
            defect(patch)
            session_hooks.install()
            with pytest.raises((AssertionError, CaptureError, SQLAlchemyError)):  # a wrong outbox, or an error
                run(engine, 200, Phase.generate)
            session_hooks.remove()
    finally:
        session_hooks.install()
