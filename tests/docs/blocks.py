"""Runs a page of the documentation as a reader would: files are written, commands typed, output compared.

A ``code-block`` with a caption is a file, whatever its language. A ``python`` block runs. A ``console`` block is a
session: lines that begin with ``$`` are typed, the others are what must come; ``…`` stands for anything, alone on a
line for any lines. After the comment ``numbers differ``, numbers and ids are those of the day when it was written. A
command with ``&`` at its end runs on. ``pip install`` is done only where asked. A command is tried again until its
output fits, because the daemons need their time.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tests.deadlines import DEADLINE
from tests.servers.processes import free_ports

__all__ = ["DOCS", "ROOT", "TUTORIAL", "Block", "Reader", "Untrue", "apart", "blocks", "environment", "fits"]

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TUTORIAL = [DOCS / "tutorial" / "index.md", DOCS / "tutorial" / "your-app.md"]  # a test of its own reads it

_FENCE = re.compile(
    r"(?:^<!-- (numbers differ) -->\n)?^```(?:\{(\S+)\}\s*)?(\w[\w-]*)?\s*\n(.*?)^```", re.MULTILINE | re.DOTALL
)
_CAPTION = re.compile(r"^:caption: (\S+)\n+")
_NUMBER = re.compile(r"\b[0-9a-f]{8}\b|\d+(?:\.\d+)?")  # or the beginning of an id


@dataclass(frozen=True)
class Block:
    """One block of a page: its language, the file it is, its text, and whether its numbers are those of one day."""

    language: str
    file: str
    text: str
    numbers_differ: bool = False


@dataclass(frozen=True)
class Command:
    """A typed line, and the output that the page promises."""

    line: str
    promised: str
    numbers_differ: bool = False


def blocks(page: str) -> Iterator[Block]:
    """The blocks that can be executed, in order."""
    for differ, directive, language, text in _FENCE.findall(page):
        caption = _CAPTION.match(text)
        if directive not in ("", "code-block") or (language not in ("python", "console") and not caption):
            continue
        yield Block(language, caption[1] if caption else "", text[caption.end() :] if caption else text, bool(differ))


def commands(block: Block) -> Iterator[Command]:
    """The typed lines of a console block."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, promised = part.partition("\n")
        yield Command(line, promised.strip("\n"), block.numbers_differ)


def fits(promised: str, found: str, *, numbers_differ: bool = False) -> bool:
    """Whether output is what the page promises."""
    if numbers_differ:
        promised, found = (
            re.sub(r"^ +| +(?= )", "", _NUMBER.sub("0", text), flags=re.MULTILINE) for text in (promised, found)
        )
    promised, found = (re.sub(r" {2,}", "  ", text) for text in (promised, found))  # columns are as wide as their data
    lines = [line.rstrip() for line in found.strip("\n").splitlines()]
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\s*\n"
        for line in promised.splitlines()
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


def environment(programs: Path) -> dict[str, str]:
    """What a reader's terminal knows whose Python and programs are in that folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OUTBOXKIT_", "PYTHON"))}
    return kept | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "80"}


def apart(page: str) -> str:
    """The page with topics and ports of its own: other tests use the same broker and machine."""
    page = page.replace("shop.orders", f"shop.orders.{uuid4().hex[:8]}")
    for port, free in zip(("8000", "8001", "9464"), free_ports(3), strict=True):
        page = page.replace(f"localhost:{port}", f"127.0.0.1:{free}")
        page = page.replace(f"--port {port}", f"--port {free}").replace(f"PORT={port}", f"PORT={free}")
    return page


class Untrue(AssertionError):
    """The page says one thing, the program another."""


class Reader:
    """A person with a folder, a terminal and the page."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], instead: Mapping[str, str], *, installs: bool = False
    ) -> None:
        self._folder = folder
        self._installs = installs
        self._environment = dict(environment)
        self._instead = instead
        self._jobs: list[subprocess.Popen[bytes]] = []

    def read(self, page: str) -> int:
        """Does what the page says; returns how many commands and programs ran."""
        done = 0
        try:
            for block in blocks(page):
                done += self._do(block)
        finally:
            for job in self._jobs:
                job.kill()
                job.wait()
        return done

    def _do(self, block: Block) -> int:
        if block.file:
            place = self._folder / block.file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(block.text)
            return 0
        if block.language == "python":
            argv = [sys.executable, "-W", "error", "-c", block.text]
            subprocess.run(argv, cwd=self._folder, env=self._environment, timeout=DEADLINE, check=True)
            return 1
        typed = list(commands(block))
        for command in typed:
            self._type(command)
        return len(typed)

    def _type(self, command: Command) -> None:
        if command.line.startswith("pip install"):
            if self._installs:  # otherwise the test's environment has it
                argv = ["sh", "-c", command.line]
                subprocess.run(argv, cwd=self._folder, env=self._environment, timeout=DEADLINE, check=True)
            return
        if assigned := re.fullmatch(r"export (\w+)=(\S+)", command.line):
            name, value = assigned.groups()
            real = not value.startswith(("memory:", "sqlite:"))  # what lives in the process or the folder is as it is
            self._environment[name] = self._instead.get(name, value) if real else value
        elif asked := re.fullmatch(r"kill (-9 )?%(\d+)", command.line):
            job = self._jobs[int(asked[2]) - 1]
            job.send_signal(signal.SIGKILL if asked[1] else signal.SIGTERM)
            if (code := job.wait(DEADLINE)) and not asked[1]:
                raise Untrue(f"{command.line}: it ended with {code}\n{self._logs()}")
        elif command.line.endswith(" &"):
            line = f"exec {command.line.removesuffix(' &')}"
            with (self._folder / f"job-{len(self._jobs)}.log").open("wb") as log:
                job = subprocess.Popen(
                    ["sh", "-c", line], cwd=self._folder, env=self._environment, stdout=log, stderr=log
                )
            self._jobs.append(job)
        else:
            self._must_fit(command, ["sh", "-c", command.line])

    def _must_fit(self, command: Command, argv: list[str]) -> None:
        deadline = time.monotonic() + DEADLINE
        while True:
            found = self._output(argv)
            if fits(command.promised, found, numbers_differ=command.numbers_differ):
                return
            # A command that only looks may look again; whatever changes something has one try.
            repeatable = re.match(r"outboxkit (status|dlq list|dlq show)", command.line)
            if not repeatable or time.monotonic() > deadline:
                raise Untrue(f"$ {command.line}\n{found}\n--- the page says:\n{command.promised}\n{self._logs()}")

    def _output(self, argv: list[str]) -> str:
        return subprocess.run(
            argv,
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=DEADLINE,
            check=False,
        ).stdout

    def _logs(self) -> str:
        return "\n".join(log.read_text()[-1500:] for log in sorted(self._folder.glob("job-*.log")))
