"""A newcomer: the wheel in an empty environment, an empty folder, and the tutorial from its first line to its last."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import servers
from tests.docs.blocks import ROOT, TUTORIAL, Reader, apart, environment


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What users install, built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A terminal with an empty virtual environment, and the versions that this project is tested with."""
    folder = tmp_path_factory.mktemp("newcomer")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    pins = re.findall(
        r"^([\w.-]+(?:\[[\w,-]+\])?==[^\s;]+(?: *;[^\\\n]*)?)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins))
    pip = {"PIP_CONSTRAINT": str(constraints), "PIP_QUIET": "1", "PIP_ROOT_USER_ACTION": "ignore"}
    return environment(folder / "venv" / "bin") | pip


@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.stem)
def test_the_tutorial_does_what_it_says(
    page: Path, wheel: Path, newcomer: dict[str, str], kafka: servers.Server, *, tmp_path: Path
) -> None:
    reader = Reader(tmp_path, newcomer, {"OUTBOXKIT_BROKER_URL": kafka.url}, installs=True)

    assert reader.read(apart(page.read_text()).replace('"../outboxkit[all]"', f'"{wheel}[all]"')) > 10

    where = ["python", "-c", "import outboxkit; print(outboxkit.__file__)"]
    found = subprocess.run(where, env=newcomer, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "newcomer" in found.stdout
