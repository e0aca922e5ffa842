"""Output of the demo: lines, and on a terminal progress bars below them."""

from __future__ import annotations

import contextlib
import shutil
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

__all__ = ["Screen"]

_INDENT: Final = "  "
_TIME_WIDTH: Final = 9  # of "  3.2 s  "
_LOOK_SECONDS: Final = 0.15
_BAR_WIDTH: Final = 40
_GLUE: Final = "\x00"  # a blank at which no line is broken


class Screen:
    """Prints the lines of the demo.

    Args:
        quiet: it says nothing.
    """

    def __init__(self, *, quiet: bool) -> None:
        self._console = Console(quiet=quiet, highlight=False, emoji=False, markup=False)
        self._width = self._console.width if self._console.is_terminal else None
        self._showed = False

    @property
    def columns(self) -> int | None:
        """Room for what a command says; None when nobody needs to care."""
        width = self._width or shutil.get_terminal_size((0, 0)).columns  # COLUMNS may say it where no terminal is
        return width - len(_INDENT) if width else None

    def say(self, seconds: float, line: str) -> None:
        """Writes a line, with the time since the start."""
        if self._showed:
            self._write("")
        self._showed = False
        self._write(f"{seconds:5.1f} s  {line}", below=_TIME_WIDTH)

    def show(self, command: str, output: str) -> None:
        """A command as a person types it, and what it answers."""
        self._console.print(Text(f"\n{_INDENT}$ {command}", style="bold"), soft_wrap=True)
        lines = output.rstrip().splitlines()
        if self.columns:
            lines = [textwrap.fill(line, self.columns) if len(line) > self.columns else line for line in lines]
        self._console.print(Text(textwrap.indent("\n".join(lines), _INDENT)), soft_wrap=True)
        self._showed = True

    def say_facts(self, facts: Mapping[str, int]) -> None:
        """Counts, none of them torn from its name."""
        self._write("\n" + "   ".join(f"{name} {count}".replace(" ", _GLUE) for name, count in facts.items()))

    def say_verdict(self, mark: str, text: str, *, good: bool = True) -> None:
        """The last words."""
        line = Text(f"{self._wrapped(f'{mark} {text}', below=2)}")
        line.stylize(f"bold {'green' if good else 'red'}", 0, len(mark))
        self._console.print(line, soft_wrap=True)

    def _write(self, text: str, *, below: int = 0) -> None:
        self._console.print(Text(self._wrapped(text, below=below)), soft_wrap=True)

    def _wrapped(self, text: str, *, below: int) -> str:
        """On a terminal, no line is longer than it; what does not fit goes on below, indented."""
        if not self._width:
            return text.replace(_GLUE, " ")
        lines = text.split("\n")
        return "\n".join(textwrap.fill(line, self._width, subsequent_indent=" " * below) for line in lines).replace(
            _GLUE, " "
        )

    @contextlib.contextmanager
    def watching(self, count: Callable[[], Mapping[str, int]], total: int) -> Iterator[None]:
        """On a terminal, bars that follow what `count` says, for as long as the block runs."""
        if not self._width or self._console.quiet:
            yield
            return
        bar = BarColumn(min(_BAR_WIDTH, self._width // 2))
        progress = Progress(TextColumn("{task.description:<10}"), bar, MofNCompleteColumn(), console=self._console)
        over = threading.Event()
        watcher = threading.Thread(target=_follow, args=(progress, count, total, over), name="progress", daemon=True)
        with progress:
            watcher.start()
            try:
                yield
            finally:
                over.set()
                watcher.join()


def _follow(progress: Progress, count: Callable[[], Mapping[str, int]], total: int, over: threading.Event) -> None:
    tasks = {name: progress.add_task(name, total=total) for name in count()}
    while True:
        ended = over.wait(_LOOK_SECONDS)
        for name, done in count().items():
            progress.update(tasks[name], completed=done)
        if ended:
            return
