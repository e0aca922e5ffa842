"""Every check of the doctor is on its page with its severity, and the page has no others."""

from __future__ import annotations

import ast
import re

from tests.architecture.source_tree import ROOT, calls, files

PAGE = ROOT / "docs" / "operate" / "doctor.md"
SEVERITIES = {"problem", "warning", "note"}


def test_every_check_is_on_the_page_with_its_severities() -> None:
    found = re.findall(r"^\| `([\w-]+)` \| ([\w, ]+) \| \S", PAGE.read_text(), re.MULTILINE)
    listed = {(name, severity) for name, severities in found for severity in severities.split(", ")}
    made = {
        (str(ast.literal_eval(call.args[0])), name)
        for file in files()
        for name, call in calls(file)
        if name in SEVERITIES and len(call.args) == 3
    }

    assert sorted(made - listed) == []
    assert sorted(listed - made) == []
    assert len(made) > 60
