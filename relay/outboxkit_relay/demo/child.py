"""``outboxkit`` as a child of the demo: the same program, but it never outlives the demo, however that ends."""

from __future__ import annotations

import os
import runpy
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Runs the command line in `sys.argv`, until it ends or standard input does."""
    threading.Thread(target=_die_with_the_demo, daemon=True).start()
    runpy.run_module("outboxkit_relay", run_name="__main__", alter_sys=True)


def _die_with_the_demo() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
