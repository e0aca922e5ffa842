"""Failures: the causes of dead letters, and one letter: why it died, and what can be done. Nothing is written here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from outboxkit import dead_letters
from outboxkit.dead_letters import DeadLetter, Filter, Group, plan, progress
from outboxkit.errors import DecodeError
from outboxkit.headers import unpack_headers
from outboxkit_relay.dashboard import reading
from outboxkit_relay.dashboard.setup import NotFound

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from outboxkit_relay.dashboard.setup import Setup

__all__ = [
    "FailuresPage",
    "GroupPage",
    "LetterPage",
    "about_it",
    "failures",
    "group",
    "id_of",
    "letter",
    "letter_named",
    "letter_page",
]

PAGE: Final = 100  # rows of a list
_OUR_HEADERS: Final = ("ce_", "outboxkit-", "content-type")

Query = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailuresPage:
    """Causes of dead letters, the most frequent first."""

    groups: Sequence[Group]
    letters: int
    looked_at: int = reading.MAX_LETTERS


def failures(connection: Connection, _: Setup, __: Query) -> FailuresPage:
    """Groups open letters by their cause."""
    return FailuresPage(groups=reading.groups(connection, Filter()), letters=reading.open_letters(connection))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupPage:
    """Letters that died of one cause."""

    group: Group
    letters: Sequence[DeadLetter]


def group(connection: Connection, _: Setup, given: Query) -> GroupPage:
    """Shows the open letters of one cause."""
    which = Filter(group=given["name"])
    found = reading.groups(connection, which, limit=1)
    if not found:
        raise NotFound(f"no open letter has the group {given['name']}: they were replayed or discarded")
    return GroupPage(group=found[0], letters=reading.letters(connection, which, limit=PAGE))


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterPage:
    """One dead letter: why, and what can be done.

    Attributes:
        headers: names, and values as they may be shown.
        payload: its size and hash, or what it is when there is none.
        family: the letters of this message, the oldest first.
        refusal: why it cannot be replayed; empty when it can.
        content: the payload as text, once revealed.
        editable: the payload as text to edit, once revealed.
        fault: what is wrong with an edited text.
        difference: lines of what an edit changes.
    """

    letter: DeadLetter
    headers: Sequence[tuple[str, str]]
    payload: str
    family: Sequence[DeadLetter]
    open_because: str
    refusal: str
    content: str | None = None
    editable: str | None = None
    fault: str = ""
    difference: Sequence[str] = ()
    why: str = ""


def letter(connection: Connection, setup: Setup, given: Query) -> LetterPage:
    """Shows one letter; payload and foreign headers stay masked."""
    return letter_page(connection, setup, letter_named(connection, given["id"]))


def letter_page(connection: Connection, setup: Setup, found: DeadLetter, **revealed: Any) -> LetterPage:
    """Everything about one letter.

    Transaction: joins the caller's; reads only.
    """
    decided = plan.draft(connection, [found.id], setup.terms()).decisions[0]
    return LetterPage(
        letter=found,
        headers=_headers(found, is_revealed=bool(revealed)),
        payload=_masked(found.payload),
        family=dead_letters.family(connection, found),
        open_because=progress.why_open(connection, found),
        refusal="" if decided.action != "none" else about_it(decided.reason, found.id),
        **revealed,
    )


def letter_named(connection: Connection, text: str) -> DeadLetter:
    """Returns the letter of an id.

    Raises:
        NotFound: there is none.
    """
    found = dead_letters.get(connection, id_of(text))
    if found is None:
        raise NotFound(f"there is no dead letter {text}")
    return found


def id_of(text: str) -> UUID:
    """Returns the number that an address names.

    Raises:
        NotFound: it is none.
    """
    try:
        return UUID(text)
    except ValueError:
        raise NotFound(f"{text} is no number of anything here") from None


def _headers(found: DeadLetter, *, is_revealed: bool) -> list[tuple[str, str]]:
    try:
        headers = unpack_headers(found.headers)
    except DecodeError:
        return [("(unreadable)", f"{len(found.headers):,} bytes")]
    return [
        (name, value.decode("utf-8", "backslashreplace") if is_revealed or name.startswith(_OUR_HEADERS) else "masked")
        for name, value in headers
    ]


def _masked(payload: bytes | None) -> str:
    if payload is None:
        return "none: a tombstone"
    return f"{len(payload):,} bytes, sha256 {hashlib.sha256(payload).hexdigest()[:12]}…"


def about_it(reason: str, letter_id: UUID) -> str:
    """Returns a reason without the number of the letter, so that the same ones can be counted."""
    return reason.replace(str(letter_id), "it")
