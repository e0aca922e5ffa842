"""Writes llms.txt beside the pages: what there is to read, and where it is as Markdown, for assistants."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["setup"]

_INTRODUCTION = """# outboxkit

> Transactional outbox and inbox for Python: events are written in the SQLAlchemy transaction, a relay publishes them to
> Kafka or RabbitMQ in order per key, an inbox lets each take effect once, and what fails becomes a dead letter that can
> be understood, repaired and replayed. PostgreSQL and SQLite.

Each page below is Markdown. The text of the commands' output is stable; `--json` is for programs.
"""


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the writing."""
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _write(app: Sphinx, failure: Exception | None) -> None:
    if failure is None and app.builder.name == "html":
        titles = {name: title.astext() for name, title in app.env.titles.items()}
        lines = [f"- [{titles[name]}](_sources/{name}.md.txt)" for name in sorted(titles)]
        Path(app.outdir, "llms.txt").write_text("\n".join([_INTRODUCTION, "## Pages", "", *lines, ""]))
