"""Exit codes of every command."""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "Exit",
]


class Exit(IntEnum):
    """Exit codes of the commands. Killed by a second signal it is 130 or 143, as shells have it."""

    OK = 0  #: done; also after a clean SIGTERM or SIGINT
    FAILED = 1  #: something went wrong while it worked
    USAGE = 2  #: the command line or the configuration is wrong: trying again cannot help
    PROBLEMS = 3  #: a check found problems
    PARTLY = 4  #: done for some, not for all
