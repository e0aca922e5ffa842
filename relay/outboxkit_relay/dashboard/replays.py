"""Replays: is it safe, how far is it, what became of each letter. Nothing is written here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

from outboxkit import dead_letters
from outboxkit.dead_letters import DeadLetter, Filter, Side, plan, progress
from outboxkit.dead_letters.plan import Health, Replay
from outboxkit.outbox import pauses
from outboxkit_relay.dashboard import reading
from outboxkit_relay.dashboard.failures import about_it, id_of, letter_named
from outboxkit_relay.dashboard.setup import NotFound
from outboxkit_relay.words import count

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.dashboard.setup import Setup

__all__ = ["MAX_CHOSEN", "PreflightPage", "ReplayPage", "ReplaysPage", "preflight", "replay", "replays"]

MAX_CHOSEN: Final = 1000  #: letters of one replay of the page; more of them are for the command
_CHOSEN: Final = 100
_SHOWN: Final = 100
_DIGITS: Final = 9  # of a number in an address: whatever comes after them, it is too large

Query = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreflightPage:
    """A replay that was looked at: what would be sent again, and what speaks against it.

    Attributes:
        number: of the replay that the form makes; pressed twice it is the same one.
        title: what was chosen.
        letters: the first ones of them.
        ids: all of them: what the page shows is what is replayed.
        goals: how many letters are for whom.
        refusals: reasons, and how many letters have each.
        checks: other facts, each with a flag whether it is well.
        query: of its address, without what can be chosen.
        back: where it came from.
    """

    number: UUID
    title: str
    letters: Sequence[DeadLetter]
    ids: Sequence[UUID]
    eligible: int
    goals: Sequence[tuple[str, int]]
    refusals: Sequence[tuple[str, int]]
    checks: Sequence[tuple[bool, str]]
    force: bool
    others: int
    query: str
    back: str


def preflight(connection: Connection, setup: Setup, given: Query) -> PreflightPage:
    """Looks at what a replay of one letter, or of the oldest letters of a cause, would do."""
    ids, title, back = _chosen(connection, given)
    terms = setup.terms(force=given.get("force") == "on")
    drafted = plan.draft(connection, ids, terms, limit=_limit(given.get("limit", "")))
    reasons = [about_it(one.reason, one.id) for one in drafted.decisions if one.action == "none"]
    going = [one.id for one in drafted.decisions if one.action != "none"]
    letters = dead_letters.in_order(connection, going)
    return PreflightPage(
        number=uuid4(),
        title=title,
        letters=letters[:_SHOWN],
        ids=drafted.letters,
        eligible=drafted.eligible,
        goals=_by_number(_goal(one) for one in letters),
        refusals=_by_number(reasons),
        checks=[*_checks(connection, letters)],
        force=terms.force,
        others=len(ids) - len(drafted.letters),
        query=f"group={group}" if (group := given.get("group")) else f"letter={ids[0]}",
        back=back,
    )


def _chosen(connection: Connection, given: Query) -> tuple[list[UUID], str, str]:
    if "letter" in given:
        letter = letter_named(connection, given["letter"])
        return [letter.id], f"letter {str(letter.id)[:8]}", f"/letters/{letter.id}"
    group = given.get("group", "")
    ids = dead_letters.ids(connection, Filter(group=group), among=reading.MAX_LETTERS)
    if not ids:
        raise NotFound(f"no open letter has the group {group}: they were replayed or discarded")
    return ids, f"{count(len(ids), 'letter')} of the group {group}", f"/failures/{group}"


def _limit(text: str) -> int:
    return max(1, min(MAX_CHOSEN, int(text[:_DIGITS]))) if text.isascii() and text.isdigit() else _CHOSEN


def _by_number(names: Iterable[str]) -> list[tuple[str, int]]:
    """Counts equal ones, the largest number first."""
    return sorted(Counter(names).items(), key=lambda one: (-one[1], one[0]))


def _goal(letter: DeadLetter) -> str:
    return letter.consumer if letter.side is Side.CONSUMER else f"topic {letter.topic}"


def _checks(connection: Connection, letters: Sequence[DeadLetter]) -> Iterator[tuple[bool, str]]:
    is_alive = progress.is_relay_alive(connection)
    yield is_alive, "a relay is alive" if is_alive else "no relay is alive: the letters wait in the outbox until one is"
    for consumer in sorted({letter.consumer for letter in letters if letter.side is Side.CONSUMER}):
        runs = progress.is_running(connection, consumer)
        yield runs, f"{consumer} is running" if runs else f"no process of {consumer} is known to run"
    names = {letter.topic for letter in letters} | {letter.type for letter in letters}
    held = [one for one in pauses.pauses(connection) if one.target.name in names]
    yield not held, "nothing is paused on the way" if not held else f"paused on the way: {held[0].target}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaysPage:
    """The latest replays."""

    replays: Sequence[Replay]


def replays(connection: Connection, _: Setup, __: Query) -> ReplaysPage:
    """Lists the latest replays."""
    return ReplaysPage(replays=plan.replays(connection))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPage:
    """One replay: how far it is, and what became of its letters.

    Attributes:
        is_running: whether this process carries it out.
        left_out: letters that were refused or are gone, with the reason, some of them.
    """

    replay: Replay
    health: Health
    is_running: bool
    left_out: Sequence[tuple[UUID, str, str]]


def replay(connection: Connection, setup: Setup, given: Query) -> ReplayPage:
    """Shows how far one replay is."""
    number = id_of(given["id"])
    found = plan.replays(connection, number)
    if not found:
        raise NotFound(f"there is no replay {number}")
    return ReplayPage(
        replay=found[0],
        health=plan.health(connection, number),
        is_running=setup.runs.is_running(number),
        left_out=reading.left_out(connection, number, limit=_SHOWN),
    )
