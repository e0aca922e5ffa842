"""What an image holds is known by name, version and licence; an audit says when nobody could answer it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

import supply_chain  # type: ignore[import-not-found]  # noqa: E402  beside the pages that it is for

PINNED = re.findall(r"^([\w.-]+)==([^ ]+)", (ROOT / "relay" / "constraints.txt").read_text(), re.MULTILINE)


def test_the_bill_of_materials_names_every_package_that_an_image_holds() -> None:
    found = supply_chain.sbom()

    assert [(one["name"], one["version"]) for one in found["components"]] == PINNED
    assert len({one["purl"] for one in found["components"]}) == len(PINNED) > 20
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["dependencies"][0]["dependsOn"] == [one["purl"] for one in found["components"]]
    assert found == supply_chain.sbom(), "the same twice"


def test_every_licence_is_known_and_copyleft_is_explained() -> None:
    known = {one.name: one.licence for one in supply_chain.packages()}
    page = (ROOT / "docs" / "reference" / "licences.md").read_text()

    assert "NOASSERTION" not in known.values()
    copyleft = {name for name, licence in known.items() if re.search("GPL|MPL|EPL|CDDL", licence)}
    assert copyleft == {"psycopg", "psycopg-binary"}
    assert all(f"**{name}**" in page for name in {name.removesuffix("-binary") for name in copyleft})


KNOWN = {"name": "click", "version": "8", "vulns": []}
FLAWED = {"name": "idna", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
SKIPPED = {"name": "yarl", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize(
    ("dependencies", "code", "words"),
    [
        ([KNOWN], 0, "1 packages audited, 0 known vulnerabilities"),
        ([KNOWN, FLAWED], 1, "idna 1: PYSEC-1, mended in 2"),
        ([KNOWN, SKIPPED], 3, "not audited, because the index knows nothing of them: yarl of 2 packages"),
        ([SKIPPED], 3, "not audited, because the index knows nothing of them: all of 1 packages"),
        ([FLAWED, SKIPPED], 1, "yarl of 2 packages"),
    ],
)
def test_an_audit_says_what_was_found_and_what_nobody_knows(
    dependencies: list[dict[str, object]], code: int, words: str
) -> None:
    lines, found = supply_chain.audited({"dependencies": dependencies})

    assert found == code
    assert words in "\n".join(lines)


def test_the_image_builds_from_pinned_parts_only() -> None:
    steps = re.findall(r"^RUN pip (.+)$", (ROOT / "relay" / "Dockerfile").read_text(), re.MULTILINE)

    assert len(steps) == 4
    assert all("--require-hashes" in step or "--no-deps" in step for step in steps)
    assert all("--no-build-isolation" in step for step in steps if step.startswith("wheel"))
