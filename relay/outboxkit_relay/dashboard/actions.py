"""Actions: the changes that the page can make, each by the function that its command calls, under the visitor's name.

An action gets the fields of its form. It returns where to go next, or a page to show at once: what a letter reveals is
shown once and stands at no address. Each can be sent twice: the second time finds nothing left to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode
from uuid import UUID

from sqlalchemy.exc import IntegrityError

from outboxkit import dead_letters, outbox, saga, schema_store, tables
from outboxkit.dead_letters import DeadLetter, plan, repair
from outboxkit.dead_letters.pace import Pace
from outboxkit.errors import ConfigurationError, OutboxKitError, ReplayError
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope, Target
from outboxkit.policy import duration
from outboxkit.rows import Request
from outboxkit_relay.dashboard.failures import LetterPage, id_of, letter_named, letter_page
from outboxkit_relay.dashboard.replays import MAX_CHOSEN
from outboxkit_relay.dashboard.setup import Malformed
from outboxkit_relay.store import operator_requests, stopped_keys

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.dashboard.setup import Setup

__all__ = ["ACTIONS", "Action", "Shown"]

_MAX_POSITION: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Shown:
    """A page that an action shows at once."""

    template: str
    page: Any


Form = Mapping[str, str]
Action = Callable[["Setup", Mapping[str, str], str], str | Shown]


# --- replays -----------------------------------------------------------------------------------------------------


def replay(setup: Setup, form: Form, by: str) -> str:
    """Replays the letters that the form names; its number makes it one replay, however often the form is sent."""
    number, ids = id_of(form["number"]), _letters(form, "replay")
    pace, terms = _pace(form), setup.terms(force=form.get("force") == "on")
    try:
        with setup.engine.begin() as connection:
            drafted = plan.draft(connection, ids, terms)
            plan.freeze(connection, drafted, terms, by=by, why=form.get("why", ""), replay_id=number)
    except IntegrityError:  # the form was sent before: its number is that replay
        return f"/replays/{number}"
    setup.runs.start(number, pace, by=by)
    return f"/replays/{number}"


def continue_replay(setup: Setup, form: Form, by: str) -> str:
    """Goes on with a replay that was stopped or cut off."""
    number = id_of(form["number"])
    setup.runs.end(number)
    with setup.engine.begin() as connection:
        plan.resume(connection, number, by=by, why=form.get("why", ""))
    setup.runs.start(number, _pace(form), by=by)
    return f"/replays/{number}"


def stop(setup: Setup, form: Form, by: str) -> str:
    """Stops a replay where it is, whoever carries it out."""
    number = id_of(form["number"])
    with setup.engine.begin() as connection:
        was = plan.stop(connection, number, by=by, why=form.get("why", "") or "stopped on the page")
    setup.runs.end(number)
    return f"/replays/{number}{'' if was else '?done=moved'}"


def _pace(form: Form) -> Pace:
    rate, first = form.get("rate", "").strip(), form.get("canary", "").strip()
    try:
        pace = Pace(rate=float(rate) if rate else None, first=int(first or 0))
    except ValueError:
        raise ConfigurationError("rate and canary are numbers: letters a second, and letters that go first") from None
    if not 0 <= pace.first <= MAX_CHOSEN or (pace.rate is not None and not 0 < pace.rate < MAX_CHOSEN**2):
        raise ConfigurationError(
            f"the rate is more than 0 letters a second, and the canary 0 to {MAX_CHOSEN:,} letters"
        )
    return pace


# --- letters -----------------------------------------------------------------------------------------------------


def discard(setup: Setup, form: Form, by: str) -> str:
    """Closes letters without sending them again; what is parked behind them goes on."""
    why, ids = _reason(form, "to discard"), _letters(form, "discard")
    with setup.engine.begin() as connection:
        done = len(operator_requests.discard_letters(connection, ids, by=by, why=why))
    told = {"done": "discarded", "number": done, "left": len(ids) - done} if done else {"done": "moved"}
    return f"{f'/letters/{ids[0]}' if len(ids) == 1 else '/failures'}?{urlencode(told)}"


def _letters(form: Form, what: str) -> list[UUID]:
    """The letters that a form names, each once."""
    ids = list(dict.fromkeys(UUID(one) for one in form["ids"].split()))
    if not 0 < len(ids) <= MAX_CHOSEN:
        raise ConfigurationError(f"the page can {what} 1 to {MAX_CHOSEN:,} letters at once, `outboxkit dlq {what}` all")
    return ids


def note(setup: Setup, form: Form, by: str) -> str:
    """Writes down what is known about a cause, and who looks after it."""
    group = form["group"]
    with setup.engine.begin() as connection:
        if not dead_letters.count(connection, dead_letters.Filter(state=None, group=group)):
            raise ConfigurationError(f"no dead letter has the group {group!r}")
        dead_letters.annotate(connection, group, by=by, note=form.get("note", ""), owner=form.get("owner", ""))
    return f"/failures/{group}?done=noted"


def reveal(setup: Setup, form: Form, by: str) -> Shown:
    """Shows payload and headers of a letter, as text to edit; the audit log says who has seen them."""
    with setup.engine.begin() as connection:
        letter = letter_named(connection, form["letter"])
        return Shown("letter.html", _revealed(connection, setup, letter, by))


def repair_letter(setup: Setup, form: Form, by: str) -> str | Shown:
    """Shows what an edited payload changes, or replays the letter with it under a new id."""
    with setup.engine.begin() as connection:
        letter = letter_named(connection, form["letter"])
        find_schema = partial(schema_store.schema_text, connection, resolve=setup.resolve)
        text = form["text"].replace("\r\n", "\n")  # as forms send lines
        try:
            payload = repair.from_text(letter, text, find_schema)
            why = form.get("why", "") or "edited on the page"
            is_dry = form.get("step") != "send"
            (decided,) = dead_letters.repair_and_replay(
                connection, {letter.id: payload}, setup.terms(), by=by, why=why, dry_run=is_dry
            )
            if decided.action == "none":
                raise ReplayError(decided.reason)
        except OutboxKitError as error:
            return Shown("letter.html", _revealed(connection, setup, letter, by, text=text, fault=error.message))
        if is_dry:
            before = repair.editable(letter, find_schema)
            lines = difflib.unified_diff(before.splitlines(), text.splitlines(), "before", "after", lineterm="", n=2)
            page = _revealed(connection, setup, letter, by, text=text, difference=[*lines], why=form.get("why", ""))
            return Shown("letter.html", page)
    return f"/letters/{letter.id}?done=repaired"


def _revealed(
    connection: Connection, setup: Setup, letter: DeadLetter, by: str, *, text: str | None = None, **more: Any
) -> LetterPage:
    content = dead_letters.reveal(connection, letter, by=by, resolve=setup.resolve, why="on the page")
    if text is None:
        find_schema = partial(schema_store.schema_text, connection, resolve=setup.resolve)
        try:
            text = repair.editable(letter, find_schema) if letter.payload else None
        except ReplayError:  # it can be shown, not edited
            text = None
    return letter_page(connection, setup, letter, content=content, editable=text, **more)


# --- keys, sagas, control ----------------------------------------------------------------------------------------


def release(setup: Setup, form: Form, by: str) -> str:
    """Asks the relay to try a waiting head at once, or to let go on what is behind a dead one."""
    return _ask(setup, form, by, Request.RELEASE)


def skip(setup: Setup, form: Form, by: str) -> str:
    """Asks the relay to make a waiting head a dead letter, and to let the others go on."""
    return _ask(setup, form, by, Request.SKIP)


def _ask(setup: Setup, form: Form, by: str, what: Request) -> str:
    key, position = bytes.fromhex(form["key"]), int(form["position"])
    if abs(position) > _MAX_POSITION:
        raise Malformed(f"the position {position:,} is larger than any")
    with setup.engine.begin() as connection:
        asked = stopped_keys.request(
            connection, form["topic"], key, what, by=by, why=form.get("why", ""), position=position
        )
    return f"/quarantine?done={'asked' if asked else 'moved'}"


def pause(setup: Setup, form: Form, by: str) -> str:
    """Holds messages of a destination, a type or a key back."""
    lasts = duration(form["lasts"]) if form.get("lasts", "").strip() else None
    with setup.engine.begin() as connection:
        pauses.pause(connection, _target(form), by=by, reason=form.get("why", ""), lasts=lasts)
    return "/control?done=paused"


def resume(setup: Setup, form: Form, by: str) -> str:
    """Lets messages go out again."""
    with setup.engine.begin() as connection:
        was = pauses.resume(connection, _target(form), by=by, why=form.get("why", ""))
    return f"/control?done={'resumed' if was else 'moved'}"


def _target(form: Form) -> Target:
    scope = Scope(form["scope"])
    key = pauses.unescaped(form.get("key", "")) if scope is Scope.KEY else None
    return Target(scope, form["name"].strip(), key)


def resume_saga(setup: Setup, form: Form, by: str) -> str:
    """Sends the current command of an instance again."""
    return _step_in(setup, form, partial(saga.resume, by=by), lambda one: not one.has_ended)


def compensate(setup: Setup, form: Form, by: str) -> str:
    """Undoes what an instance has done so far."""
    return _step_in(setup, form, partial(saga.compensate, by=by), lambda one: one.status is saga.Status.RUNNING)


def _step_in(setup: Setup, form: Form, ask: Callable[..., None], helps: Callable[[Any], bool]) -> str:
    """Asks for what still helps: a saga may have ended since its page was loaded."""
    name, key = form["saga"], form["key"]
    with setup.engine.begin() as connection:
        found = saga.get(connection, name, key)
        is_late = found is not None and not helps(found.instance)
        if not is_late:
            ask(connection, name, key, why=form.get("why", ""))
    return "/sagas/show?" + urlencode({"saga": name, "key": key, "done": "moved" if is_late else "asked"})


def cancel(setup: Setup, form: Form, by: str) -> str:
    """Cancels a scheduled message that is not due yet."""
    why = _reason(form, "to cancel")
    with setup.engine.begin() as connection:
        was = outbox.cancel(connection, form["message"])
        if was:
            entry = {"who": by, "action": "messages.cancel", "target": form["message"], "why": why}
            connection.execute(tables.outbox_audit.insert().values(**entry))
    return f"/messages?q=state:scheduled&done={'cancelled' if was else 'moved'}"


def _reason(form: Form, what: str) -> str:
    if not (why := form.get("why", "").strip()):
        raise ConfigurationError(f"{what} takes a reason: the audit log keeps it")
    return why


ACTIONS: Final[Mapping[str, Action]] = {
    "cancel": cancel,
    "compensate": compensate,
    "discard": discard,
    "go-on": continue_replay,
    "note": note,
    "pause": pause,
    "release": release,
    "repair": repair_letter,
    "replay": replay,
    "resume": resume,
    "resume-saga": resume_saga,
    "reveal": reveal,
    "skip": skip,
    "stop": stop,
}
