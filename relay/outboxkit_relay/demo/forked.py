"""Children from Python's own fork server: what they import, more than a second of each, is imported once."""

from __future__ import annotations

import os
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from socket import socket, socketpair
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

__all__ = ["fork", "warm_up"]

# What nearly every child imports; none of these reads settings, or connects, when it is imported.
_WARM: Final = (
    "aiosqlite",
    "outboxkit.brokers.kafka",
    "outboxkit.codecs.avro",
    "outboxkit.consumer",
    "outboxkit.dialects.postgresql",
    "outboxkit.dialects.sqlite",
    "outboxkit.registries.directory",
    "outboxkit_relay.cli.consume",
    "outboxkit_relay.cli.dlq.commands",
    "outboxkit_relay.cli.relay",
    "outboxkit_relay.demo.contracts",
)
_server = get_context("forkserver")


def warm_up() -> None:
    """Starts the process that the others are forked from; it imports while the demo does."""
    _server.set_forkserver_preload(list(_WARM))
    forkserver.ensure_running()


def fork(
    command: Sequence[str], *, log: Path, variables: Mapping[str, str], answers: bool
) -> tuple[ForkServerProcess, socket]:
    """Starts ``python -m`` of a module, in the folder of its log and with these variables only.

    It ends with its standard input, and so never outlives the demo, however that ends.

    Args:
        command: the module, and its arguments.
        log: a file that takes what it writes.
        variables: its environment.
        answers: it reads its standard input itself, and answers there.

    Returns:
        The process, and the other end of its standard input.
    """
    ours, theirs = socketpair()
    with theirs:
        arguments = (list(command), theirs, log, dict(variables), answers)
        process = _server.Process(target=_become, args=arguments, daemon=True)
        process.start()
    return process, ours


def _become(command: list[str], pipe: socket, log: Path, variables: dict[str, str], answers: bool) -> None:  # noqa: FBT001, PLR0917
    from outboxkit_relay.settings import replace_environment

    os.setsid()  # Ctrl-C is for the demo, which then stops its children in order
    os.chdir(log.parent)
    replace_environment(variables)
    errors = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(pipe.detach(), 0)
    os.dup2(0 if answers else errors, 1)
    os.dup2(errors, 2)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww"))
    if not answers:
        threading.Thread(target=_end_with_the_demo, daemon=True).start()
    sys.argv = command
    sys.path.insert(0, str(log.parent))  # as `python -m` does
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _end_with_the_demo() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)
