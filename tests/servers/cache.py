"""What is downloaded once per user and kept between sessions."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["cached"]


def _root() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "outboxkit"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """One builder at a time, over all processes of this user."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build` fills it once, and only a complete one is ever seen."""
    target = _root() / name
    if target.is_dir():
        return target
    with _alone(_root() / f"{name}.lock"):
        if target.is_dir():
            return target
        workshop = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_root()))
        try:
            build(workshop)
            workshop.rename(target)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    return target
