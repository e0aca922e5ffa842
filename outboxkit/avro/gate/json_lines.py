"""Finds the line of a JSON pointer in a JSON text, so that a problem can be shown where it was written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

__all__ = ["line_of"]

_TOKEN: Final = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[][{}:,]|[^\s\[\]{}:,"]+)', re.DOTALL)
_Tokens = Iterator[re.Match[str]]


def line_of(text: str, pointer: str) -> int:
    """Returns the line (from 1) on which the value at `pointer` begins, or the nearest value around it.

    RFC 6901 pointers as this package makes them: names and numbers, nothing that needs escaping.
    """
    steps = [step for step in pointer.split("/") if step]
    start = _found(text, steps)
    return text.count("\n", 0, start) + 1


def _found(text: str, steps: list[str]) -> int:
    tokens = _TOKEN.finditer(text)
    at = 0
    for step in [*steps, None]:
        token = next(tokens, None)
        if token is None:
            return at
        at = token.start(1)
        if step is None or token[1] not in ("{", "["):
            return at
        if not (_enter_object(tokens, step) if token[1] == "{" else _enter_array(tokens, step)):
            return at
    return at


def _enter_object(tokens: _Tokens, key: str) -> bool:
    """Goes to the value of a key; the tokens then continue with it."""
    for token in tokens:
        if token[1] == "}":
            return False
        if token[1] == ",":
            continue
        next(tokens, None)  # the colon
        if token[1] == f'"{key}"':
            return True
        _skip(tokens)
    return False


def _enter_array(tokens: _Tokens, index: str) -> bool:
    for _ in range(int(index) if index.isdecimal() else 0):
        if not _skip(tokens):
            return False
        comma = next(tokens, None)
        if comma is None or comma[1] != ",":
            return False
    return True


def _skip(tokens: _Tokens) -> bool:
    """Passes over one value."""
    depth = 0
    for token in tokens:
        depth += (token[1] in ("{", "[")) - (token[1] in ("}", "]"))
        if depth <= 0:
            return depth == 0
    return False
