"""Runs one benchmark, or says which there are: python -m benchmarks relay --quick."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))

if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
    sys.exit(f"usage: scripts/bench {'|'.join(NAMES)} [--quick] [--json FILE]")
sys.path.insert(0, str(HERE.parent))
sys.argv = [str(HERE / f"{sys.argv[1]}.py"), *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name="__main__")
