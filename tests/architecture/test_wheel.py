"""What a user installs: both packages, the Avro contracts, and plugs that lead somewhere."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from tests.architecture.source_tree import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_wheel_holds_both_packages_and_the_contracts(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"outboxkit/py.typed", "outboxkit/errors.py", "outboxkit_relay/settings.py"} <= names
    contracts = {file.relative_to(ROOT / "schemas") for file in (ROOT / "schemas").glob("*/*.avsc")}
    assert {f"outboxkit/contracts/{contract}" for contract in contracts} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_every_plug_leads_to_a_module() -> None:
    groups: dict[str, dict[str, str]] = PROJECT["entry-points"]
    written = {group for group in groups if (ROOT / group.replace(".", "/") / "__init__.py").is_file()}

    modules = {module for group in written for module in groups[group].values()}
    assert not {module for module in modules if not _exists(module)}


def _exists(module: str) -> bool:
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()
