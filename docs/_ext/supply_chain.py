"""Supply chain: the packages that an image of the relay holds, their licences, a bill of materials, and an audit.

The versions are those of ``relay/constraints.txt``; the licences are what each package says of itself, where it is
installed::

    python docs/_ext/supply_chain.py sbom             # CycloneDX, for scripts/sbom
    python docs/_ext/supply_chain.py audited REPORT   # of pip-audit, for scripts/check --audit
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

__all__ = ["Package", "audited", "licences", "packages", "sbom"]

ROOT = Path(__file__).parents[2]
PINS = ROOT / "relay" / "constraints.txt"
_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+)(?: ; (?P<where>[^\\\n]+?))? *\\?$", re.MULTILINE)
_SPDX = {"Apache Software License": "Apache-2.0", "MIT License": "MIT", "BSD License": "BSD-3-Clause"}


@dataclass(frozen=True, slots=True)
class Package:
    """One package of the image.

    Attributes:
        name: as the index has it.
        version: the pinned one.
        where: the marker of the platforms that get it, empty for all.
        licence: an SPDX expression.
    """

    name: str
    version: str
    where: str
    licence: str


def packages() -> list[Package]:
    """The packages that ``relay/constraints.txt`` pins."""
    return [
        Package(pin["name"], pin["version"], (pin["where"] or "").strip(), _licence(pin["name"]))
        for pin in _PIN.finditer(PINS.read_text("utf-8"))
    ]


def licences() -> Iterator[str]:
    """The table of the page."""
    yield "| package | version | licence |"
    yield "|---|---|---|"
    for one in packages():
        yield f"| {one.name} | {one.version} | {one.licence} |"


def sbom() -> dict[str, Any]:
    """The bill of materials of an image of the relay, in CycloneDX."""
    found = packages()
    ours = {
        "type": "application",
        "name": "outboxkit",
        "version": metadata.version("outboxkit"),
        "bom-ref": "outboxkit",
    }
    components = [
        {
            "type": "library",
            "bom-ref": _purl(one),
            "name": one.name,
            "version": one.version,
            "purl": _purl(one),
            "licenses": [{"expression": one.licence}],
        }
        for one in found
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, json.dumps([ours, components]))}",
        "version": 1,
        "metadata": {"component": {**ours, "licenses": [{"expression": _licence("outboxkit")}]}},
        "components": components,
        "dependencies": [{"ref": "outboxkit", "dependsOn": [_purl(one) for one in found]}],
    }


def audited(report: dict[str, Any]) -> tuple[list[str], int]:
    """Reads a report of pip-audit: its lines, and the exit code, 1 for a vulnerability and 3 when nobody knows."""
    found = report["dependencies"]
    unknown = [one["name"] for one in found if "skip_reason" in one]
    lines = [
        f"{one['name']} {one['version']}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version yet'}"
        for one in found
        for flaw in one.get("vulns", ())
    ]
    if unknown:
        what = "all" if len(unknown) == len(found) else ", ".join(unknown)
        said = f"not audited, because the index knows nothing of them: {what} of {len(found)} packages"
        return [*lines, said], 1 if lines else 3
    return [*lines, f"{len(found)} packages audited, {len(lines)} known vulnerabilities"], 1 if lines else 0


def _purl(one: Package) -> str:
    return f"pkg:pypi/{one.name}@{one.version}"


def _licence(name: str) -> str:
    """The licence that a package names; its classifier where it is older than SPDX expressions."""
    try:
        said = metadata.metadata(name)
    except metadata.PackageNotFoundError:  # of another platform
        return "NOASSERTION"
    if expression := said.get("License-Expression"):
        return expression
    classified = [text.rpartition(" :: ")[2] for text in said.get_all("Classifier") or () if text.startswith("License")]
    given = (said.get("License") or "").partition("\n")[0]
    return next((_SPDX[text] for text in classified if text in _SPDX), given or "NOASSERTION")


def main(what: str, *arguments: str) -> int:
    """Prints what was asked for; returns the exit code."""
    if what == "sbom":
        print(json.dumps(sbom(), indent=2))
        return 0
    told = Path(arguments[0]).read_text("utf-8")
    lines, code = audited(json.loads(told)) if told else (["not audited: the index cannot be reached"], 3)
    print(*lines, sep="\n")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
