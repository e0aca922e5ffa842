"""The command line ``outboxkit``. Data goes to standard output, talk to standard error.

Nothing here or in `outboxkit_relay.cli.main` imports the library: `--help` and completion must be quick.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "run"]

_NEEDED: Final = ("click", "structlog")  # one alone may be there for another reason


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Carries out a command line; returns the exit code. No error leaves as a traceback."""
    missing = next((name for name in _NEEDED if find_spec(name) is None), None)
    if missing:
        print(f"outboxkit: the command line needs {missing}; run: pip install 'outboxkit[relay]'", file=sys.stderr)
        return 2
    try:
        from outboxkit_relay.cli.main import program

        return int(program.main(args=arguments, prog_name="outboxkit", standalone_mode=False) or 0)
    except Exception as error:  # noqa: BLE001  the boundary: nothing leaves as a traceback
        from outboxkit_relay.cli.console import errors

        return errors.report(error)
