"""Secrets that every test carries along, and the search for them in all that was said and written down.

The logins of the test servers have a password that nothing else is called; messages have a header with personal data.
Wherever one of these words turns up (a log at any level, a traceback, the output of a command, a daemon's file), the
test fails, whatever it was about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

__all__ = ["CANARIES", "HEADER", "PASSWORD", "fails_where_one_is_shown", "found_in"]

PASSWORD: Final = "c4n4ry-password"
HEADER: Final = "c4n4ry-of-a-person"
CANARIES: Final = (PASSWORD, HEADER)


def found_in(*texts: str) -> list[str]:
    """Lines with a canary in them."""
    return [line for text in texts for line in text.splitlines() if any(one in line for one in CANARIES)]


def fails_where_one_is_shown(item: pytest.Item, report: pytest.TestReport) -> None:
    """Searches what a test that has ended has left: what was captured of it, and the files of its daemons."""
    folder = getattr(item, "funcargs", {}).get("tmp_path")
    files = sorted(folder.rglob("*.log")) if isinstance(folder, Path) and folder.is_dir() else []
    said = [content for _, content in report.sections]
    shown = found_in(*said, *(path.read_text(errors="replace") for path in files))
    if shown and report.outcome == "passed":
        report.outcome = "failed"
        report.longrepr = "a canary was shown:\n" + "\n".join(shown[:20])
