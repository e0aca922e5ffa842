"""The language of the house: docstrings that begin with a statement, and words that are no longer used."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT, files, identifiers, nodes, place

QUESTION = re.compile(r"(What|Who|Whose|How|Where|Which)\b")

# One meaning per word: what a name may not contain any more, and the word of the field that took its place.
RETIRED = {
    r"canar(y|ies)": "rollout",
    r"condemn": "block",
    r"dialogue": "protocol",
    r"fading": "settled_but_maybe_read",
    r"hearsay": "evidence",
    r"judge": "decide, evaluate, audit",
    r"most|least": "max, min",
    r"mourn(s|ers?)?": "dead_letter_hooks",
    r"pardon": "unblock",
    r"whereabouts": "find_message",
}
RETIRED_NAMES = {
    "Balance": "Rebalance",
    "Bucket": "TokenBucket",
    "CopyTo": "DeadLetterTopic",
    "Flight": "InFlightBatch",
    "Given": "TransactionScope",
    "Handling": "MessageProcessor",
    "Missed": "RescanResult",
    "Recipient": "HandlerLookup",
    "Rules": "RelayConfig",
    "Spent": "FailedAttempt",
    "Trouble": "DatabaseTrouble, ChannelError, Unavailability",
    "Watch": "Rescan",
    "Written": "EncodedVersion",
    "bring_back": "reinsert_head",
    "bury_the_dead": "expire_relays",
    "fly": "sent",
    "flying": "in_flight",
    "go_on": "resume_key",
    "heavy": "large",
    "how_many_stops": "count_stopped_keys",
    "join_the_line": "append_followers",
    "land": "acknowledged",
    "lighten": "release_bytes",
    "set_aside": "move_to_waiting",
    "surplus": "has_surplus",
    "try_now": "retry_head",
    "weigh": "track_bytes",
}

DOCS = [ROOT / "README.md", ROOT / "llms.txt", *sorted((ROOT / "docs").rglob("*.md"))]


def _docstrings() -> Iterator[tuple[str, str]]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in files():
        for node in nodes(file):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                yield place(file, node), text


def test_a_docstring_begins_with_a_verb_or_a_noun_and_no_question_word() -> None:
    questions = [f"{where}: {text.splitlines()[0]}" for where, text in _docstrings() if QUESTION.match(text)]

    assert not questions


@functools.cache
def _retired(name: str) -> str | None:
    """The words that took a name's place; None when the name is in use."""
    if replacement := RETIRED_NAMES.get(name.lstrip("_")):
        return replacement
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    for part, replacement in RETIRED.items():
        for before, word in zip(["", *words], words, strict=False):
            if re.fullmatch(part, word) and before not in {
                "at",
                "in",
            }:  # `at_least_once` and `in_flight` are the field's
                return replacement
    return None


@pytest.mark.parametrize(
    ("name", "retired"),
    [
        ("CopyTo", True),
        ("_mourners", True),
        ("MOST_BYTES", True),
        ("heavy", True),
        ("Flight", True),
        ("in_flight", False),
        ("InFlightBatch", False),
        ("at_least_once", False),
        ("almost", False),
        ("TokenBucket", False),
    ],
)
def test_the_rule_itself_tells_old_words_from_new_ones(name: str, *, retired: bool) -> None:
    assert (_retired(name) is not None) is retired


def test_no_name_in_the_code_is_a_retired_word() -> None:
    found = {name: place(file) for file in files() for name in identifiers(file) if _retired(name)}

    assert not {name: f"{where}: say {_retired(name)}" for name, where in found.items()}


@pytest.mark.parametrize("page", DOCS, ids=place)
def test_no_page_names_a_retired_word(page: Path) -> None:
    """In code, and there no plain word: a comment speaks English."""
    code = re.findall(r"```.*?```|`[^`\n]+`", page.read_text(), re.DOTALL)
    names = {name for part in code for name in re.findall(r"[A-Za-z_]\w*", part)}
    names = {name for name in names if not name.islower() or "_" in name}

    assert not {name: _retired(name) for name in names if _retired(name)}
