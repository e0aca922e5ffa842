"""Who may import whom: the contracts in pyproject.toml, checked by import-linter."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from tests.architecture.source_tree import ROOT


def test_the_import_contracts_hold() -> None:
    program = Path(sys.executable).with_name("lint-imports")

    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_there_are_contracts_to_hold() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert len(project["tool"]["importlinter"]["contracts"]) >= 14
