"""The program in an interpreter of its own: what it imports, and what it says where an extra is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from outboxkit_relay.cli.main import COMMANDS


def test_help_imports_neither_the_library_nor_its_dependencies() -> None:
    code = (
        "import sys; from outboxkit_relay.cli import run; code = run(['--help']);"
        "heavy = {'outboxkit', 'sqlalchemy', 'pydantic', 'structlog', 'confluent_kafka'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy or code else 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("click", "the command line needs click; run: pip install 'outboxkit[relay]'"),
        ("structlog", "the command line needs structlog; run: pip install 'outboxkit[relay]'"),
        ("pydantic_settings", "this command needs the module pydantic_settings; run: pip install 'outboxkit[all]'"),
        ("psycopg", "postgresql needs the module psycopg; install it: pip install 'outboxkit[postgres]'"),
        ("confluent_kafka", "kafka needs the module confluent_kafka; install it: pip install 'outboxkit[kafka]'"),
        ("aio_pika", "amqp needs the module aio_pika; install it: pip install 'outboxkit[rabbitmq]'"),
    ],
)
def test_without_an_extra_one_line_says_what_to_install(missing: str, said: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from outboxkit_relay.cli import main; main(['relay', 'run'])"
    database = f"sqlite:///{tmp_path / 'outbox.db'}" if missing != "psycopg" else "postgresql://nobody@127.0.0.1:1/none"
    broker = "amqp://127.0.0.1:1/" if missing == "aio_pika" else "kafka://127.0.0.1:1"
    settings = {"OUTBOXKIT_DATABASE_URL": database, "OUTBOXKIT_BROKER_URL": broker}

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | settings
    )

    assert (done.returncode, done.stderr) == (2, f"outboxkit: {said}\n")


PAGE = Path(__file__).parents[4] / "docs" / "reference" / "cli.md"
TYPED = {
    "bash": {"COMP_WORDS": "outboxkit messages re", "COMP_CWORD": "2"},
    "zsh": {"COMP_WORDS": "outboxkit messages re", "COMP_CWORD": "2"},
    "fish": {"COMP_WORDS": "outboxkit messages re", "COMP_CWORD": "re"},
}


@pytest.mark.parametrize("shell", TYPED)
def test_each_shell_completes_commands_by_the_line_of_the_page(shell: str) -> None:
    def said(what: str, **typed: str) -> str:
        command = [Path(sys.executable).with_name("outboxkit")]
        environment = os.environ | typed | {"_OUTBOXKIT_COMPLETE": f"{shell}_{what}"}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert f"_OUTBOXKIT_COMPLETE={shell}_source outboxkit" in PAGE.read_text()
    assert "_outboxkit_completion" in said("source")
    assert "redirect" in said("complete", **TYPED[shell])
