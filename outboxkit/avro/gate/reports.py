"""A result as text for people, JSON, GitHub annotations or JUnit XML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final
from xml.etree import ElementTree as ET

from outboxkit.avro.compatibility.problems import Problem
from outboxkit.avro.gate.evaluate import Finding, GateResult

__all__ = ["FORMATS", "problem_facts", "render"]

MAX_EXAMPLE: Final = 300
"""Characters of an example that are shown to people; JSON carries all."""
MAX_VERSIONS: Final = 3
"""Versions that are named; the others are counted."""


def render(result: GateResult, form: str) -> str:
    """Returns the result in one of `FORMATS`."""
    return _RENDERERS[form](result)


def problem_facts(problem: Problem) -> dict[str, Any]:
    """Returns a problem as a JSON object; the key `example` is there only when one was built."""
    facts = {
        "kind": problem.kind.value,
        "severity": problem.severity.value,
        "reader_path": problem.reader_path,
        "reader_pointer": problem.reader_pointer,
        "reader_fragment": problem.reader_fragment,
        "writer_path": problem.writer_path,
        "writer_pointer": problem.writer_pointer,
        "writer_fragment": problem.writer_fragment,
        "message": problem.message,
        "fix": problem.fix,
        "direction": None if problem.direction is None else problem.direction.value,
    }
    return facts | ({"witness": problem.example} if problem.has_example else {})


def _facts(finding: Finding) -> dict[str, Any]:
    place = {"subject": finding.subject, "file": finding.file, "line": finding.line}
    return place | {"against": list(finding.against), **problem_facts(finding.problem)}


def _text(result: GateResult) -> str:
    blocks = [_block(one) for one in (*result.errors, *result.warnings)]
    blocks += [f"allowed: {one.problem.kind.value} at {one.path} of {one.subject}" for one in result.allowed]
    blocks += [
        f"expired: the allow entry for {one.kind.value} at {one.path} ended {one.until}" for one in result.expired
    ]
    blocks += [f"unused: nothing needs the allow entry for {one.kind.value} at {one.path}" for one in result.unused]
    count = len(result.errors)
    blocks.append("Compatible." if result.passed else f"{count} problem{'s' if count > 1 else ''} to repair.")
    return "\n".join(blocks) + "\n"


def _block(finding: Finding) -> str:
    problem = finding.problem
    place = f"{finding.file}:{finding.line}: " if finding.file else ""
    weight = "" if problem.is_error else "warning: "
    pointer = problem.reader_pointer or "/"
    lines = [f"{place}{weight}{problem.kind.value} at {problem.reader_path} ({pointer})", f"  {problem.message}"]
    if finding.against:
        lines.append(f"  against: {_versions(finding.against)}")
    if finding.breaks:
        lines.append(f"  breaks: {finding.breaks}")
    if problem.has_example:
        example = json.dumps(problem.example)
        lines.append(f"  cannot be read: {example if len(example) <= MAX_EXAMPLE else f'{example[:MAX_EXAMPLE]}…'}")
    return "\n".join([*lines, f"  fix: {problem.fix}"])


def _versions(names: tuple[str, ...]) -> str:
    rest = len(names) - MAX_VERSIONS
    shown = list(names[-MAX_VERSIONS:]) + ([f"{rest} older"] if rest > 0 else [])
    return ", ".join(shown)


def _json(result: GateResult) -> str:
    facts: dict[str, Any] = {
        "passed": result.passed,
        "errors": [_facts(one) for one in result.errors],
        "warnings": [_facts(one) for one in result.warnings],
        "allowed": [_facts(one) for one in result.allowed],
    }
    for name, entries in (("expired", result.expired), ("unused", result.unused)):
        facts[name] = [
            {"subject": one.subject, "kind": one.kind.value, "path": one.path, "until": one.until.isoformat()}
            for one in entries
        ]
    return json.dumps(facts) + "\n"


def _github(result: GateResult) -> str:
    lines = [_annotation("error", one) for one in result.errors]
    return "".join([*lines, *(_annotation("warning", one) for one in result.warnings)])


def _annotation(level: str, finding: Finding) -> str:
    problem = finding.problem
    title = _escaped(f"{problem.kind.value} at {problem.reader_path}").replace(":", "%3A").replace(",", "%2C")
    file = _escaped(finding.file).replace(":", "%3A").replace(",", "%2C")
    body = _escaped(f"{problem.message}\nagainst: {_versions(finding.against)}\nfix: {problem.fix}")
    return f"::{level} file={file},line={finding.line},title={title}::{body}\n"


def _escaped(text: str) -> str:
    # GitHub's workflow commands: these three end or split a command.
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _junit(result: GateResult) -> str:
    subjects: dict[str, list[Finding]] = {}
    for one in (*result.errors, *result.allowed, *result.warnings):
        subjects.setdefault(one.subject, []).append(one)
    suite = ET.Element("testsuite", name="schemas", tests=str(len(subjects)))
    for subject, findings in subjects.items():
        case = ET.SubElement(suite, "testcase", classname="schemas", name=subject)
        broken = [one for one in findings if one in result.errors]
        if broken:
            failure = ET.SubElement(case, "failure", message=f"{len(broken)} problems")
            failure.text = _printable("\n".join(_block(one) for one in broken))
    suite.set("failures", str(len({one.subject for one in result.errors})))
    return ET.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def _printable(text: str) -> str:
    # XML 1.0 has no way to write most control characters.
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


_RENDERERS: Final[Mapping[str, Callable[[GateResult], str]]] = {
    "github": _github,
    "json": _json,
    "junit": _junit,
    "text": _text,
}
FORMATS: Final = tuple(_RENDERERS)
