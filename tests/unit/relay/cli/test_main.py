"""The program as a whole: help, version, what it imports, and how it fails."""

from __future__ import annotations

import importlib
from importlib.metadata import version

import click
import pytest

from outboxkit.errors import ConfigurationError, LeaseLost
from outboxkit_relay.cli.console import errors
from outboxkit_relay.cli.main import COMMANDS
from tests.unit.relay.cli.conftest import Outboxkit


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_of_commands_says_what_each_command_says_itself(name: str) -> None:
    module, text = COMMANDS[name]

    found: click.Command = importlib.import_module(module).command

    assert (found.help or "").partition("\n")[0] == text


def test_the_version_is_that_of_the_distribution(outboxkit: Outboxkit) -> None:
    assert outboxkit("--version").out == f"outboxkit {version('outboxkit')}\n"


@pytest.mark.parametrize("arguments", [["no-such-command"], ["status", "--no-such-option"], ["dlq", "show"]])
def test_a_wrong_command_line_is_usage(outboxkit: Outboxkit, arguments: list[str]) -> None:
    done = outboxkit(*arguments)

    assert done.code == 2
    assert "Error:" in done.err
    assert not done.out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigurationError("wrong"), 2),
        (LeaseLost(), 1),
        (ModuleNotFoundError("no", name="aio_something"), 2),
        (ZeroDivisionError("secret text"), 1),
        (click.Abort(), 1),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error: Exception, code: int) -> None:
    assert errors.report(error) == code


def test_an_interrupted_question_is_an_interrupt() -> None:
    error = click.Abort()
    error.__cause__ = KeyboardInterrupt()

    assert errors.report(error) == 130


@pytest.mark.parametrize(
    ("module", "words"),
    [("psycopg", "run: pip install 'outboxkit[all]'"), ("fastapi.testing", "is it installed in this environment?")],
)
def test_a_missing_module_is_blamed_on_who_needs_it(module: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert errors.report(ModuleNotFoundError(name=module)) == 2

    assert capfd.readouterr().err == f"outboxkit: this command needs the module {module}; {words}\n"


def test_an_unexpected_error_names_its_place_and_keeps_its_text(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        dict[str, int]()["customer 4711 owes"]
    except KeyError as error:
        errors.report(error)

    said = capfd.readouterr().err
    assert "KeyError at test_main.py:" in said
    assert "4711" not in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("DATABASE_URL=no url at all", "postgresql+psycopg://user@host/database"),
        ("DATABASE_URL=mysql://root@localhost/x", "'mysql' is not supported"),
        ("DATABASE_URL=", "OUTBOXKIT_DATABASE_URL"),
        ("DATABASE_URL=sqlite:////no/such/folder/app.db", "cannot be opened"),
        ("RELAY__BATCH_SIZE=many", "relay.batch_size"),
        ("RELAY__NO_SUCH_KEY=1", "no_such_key"),
        ("NO_SUCH_SECTION=1", "OUTBOXKIT_NO_SUCH_SECTION"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(
    outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch, setting: str, words: str
) -> None:
    name, _, value = setting.partition("=")
    monkeypatch.setenv(f"OUTBOXKIT_{name}", value)

    done = outboxkit("status")

    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1
    assert not done.out


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("no url at all", "no known scheme"),
        ("carrier-pigeon://roof", "no known scheme"),
        ("kafka://", "names no host"),
        ("kafka://localhost?plugin.library.paths=x", "'plugin.library.paths' is not allowed"),
    ],
)
def test_a_wrong_broker_url_is_one_line_that_says_what_is_expected(
    outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch, url: str, words: str
) -> None:
    monkeypatch.setenv("OUTBOXKIT_BROKER_URL", url)

    done = outboxkit("relay", "run")

    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "url", "variable"),
    [
        ("--database-url", "postgresql://app:CANARY@host/db", "OUTBOXKIT_DATABASE_URL"),
        ("--database-url", "postgresql://host/db?password=CANARY", "OUTBOXKIT_DATABASE_URL"),
        ("--broker-url", "kafka://app:CANARY@host", "OUTBOXKIT_BROKER_URL"),
        ("--broker-url", "kafka://host?sasl.password=CANARY", "OUTBOXKIT_BROKER_URL"),
    ],
)
def test_a_secret_as_an_argument_is_refused_and_not_repeated(
    outboxkit: Outboxkit, flag: str, url: str, variable: str
) -> None:
    done = outboxkit(flag, url, "status")

    assert done.code == 2
    assert variable in done.err
    assert "CANARY" not in done.err + done.out


def test_missing_tables_are_one_line_that_says_what_to_run(outboxkit: Outboxkit) -> None:
    for arguments in (["status"], ["relay", "run"], ["prune"], ["dlq", "list"]):
        done = outboxkit(*arguments)

        assert done.code == 2
        assert "outboxkit init" in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("app", "module:consumer"),
        ("no_such_app:billing", "no module 'no_such_app'"),
        ("json:billing", "has no 'billing'"),
        ("json:dumps", "has a function"),
    ],
)
def test_a_consumer_that_is_not_there_is_one_line(outboxkit: Outboxkit, name: str, words: str) -> None:
    done = outboxkit("consume", name)

    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["stauts"], "Did you mean outboxkit status?"),
        (["dlq", "gruops"], "Did you mean outboxkit dlq groups?"),
        (["xyz"], None),
    ],
)
def test_a_mistyped_command_is_told_with_the_one_that_is_meant(
    outboxkit: Outboxkit, typed: list[str], meant: str | None
) -> None:
    done = outboxkit(*typed)

    assert done.code == 2
    assert typed[-1] in done.err
    assert (meant is None and "mean" not in done.err) or (meant or "") in done.err


@pytest.mark.parametrize(
    ("variable", "told"),
    [
        ("OUTBOXKIT_RELAY__BATCHSIZE", "relay.batchsize: there is no such setting; did you mean relay.batch_size?"),
        ("OUTBOXKIT_RELAY__XYZ", "relay.xyz: there is no such setting\n"),
    ],
)
def test_a_mistyped_setting_is_told_with_the_one_that_is_meant(
    outboxkit: Outboxkit, monkeypatch: pytest.MonkeyPatch, variable: str, told: str
) -> None:
    monkeypatch.setenv(variable, "3")

    done = outboxkit("status")

    assert done.code == 2
    assert told in done.err
