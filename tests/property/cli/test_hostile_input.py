"""Random settings, arguments and control rows: each is refused by a line that says why, or a command undoes it."""

from __future__ import annotations

import io
import json
import random
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
from sqlalchemy import Engine, insert, text

from outboxkit import outbox, tables
from outboxkit.brokers import memory, open_publisher
from outboxkit.errors import ConfigurationError
from outboxkit.outbox import pauses
from outboxkit.outbox.pauses import Scope
from outboxkit_relay import load, redaction
from outboxkit_relay.exit_codes import Exit
from outboxkit_relay.settings import Settings
from tests.conftest import PROFILE
from tests.integration.relay.world import message, relaying, until
from tests.unit.relay.cli.conftest import Outboxkit

FULL: Final = PROFILE == "full"
CANARY: Final = "c4n4ry-pw"
HOSTILE: Final = [
    "", " ", "0", "-1", "1e999", "nan", "9" * 400, "99999999999999999d", "-5m", "5 parsecs", "1h30m", "infinity",
    "2026-02-31", "2026-13-01T00:00:00Z", "0001-01-01T00:00:00+23:59", "\x1b[2J", "\u202egpj", "a\nb", "\udc80",
    "%s%n", "'; DROP TABLE x; --", "../../etc/passwd", "x" * 10_000, "ü" * 300, "{", "[]", "null", "true", "*", "?",
    "orders", "7", str(uuid4()), "latest", f"postgresql://u:{CANARY}@/x", "memory://", "kafka://\x00",
]  # fmt: skip
COMMANDS: Final = [
    ("status",), ("status", "--limit"), ("status", "--message"), ("log",), ("log", "--since"), ("log", "--action"),
    ("log", "--limit"), ("dlq", "list"), ("dlq", "list", "--since"), ("dlq", "list", "--until"),
    ("dlq", "list", "--key"), ("dlq", "list", "--state"), ("dlq", "list", "--limit"), ("dlq", "show"),
    ("dlq", "explain"), ("dlq", "groups", "--since"), ("dlq", "replay", "--yes"),
    ("dlq", "replay", "--all", "--dry-run", "--rate"), ("dlq", "discard", "--yes", "--why", "x"), ("dlq", "note"),
    ("dlq", "export", "--why", "x"), ("dlq", "import", "--dry-run"), ("dlq", "repair", "--dry-run", "--with"),
    ("dlq", "replays"), ("dlq", "resume"), ("dlq", "stop", "--why", "x"), ("relay", "pauses"),
    ("relay", "pause", "--why", "x"), ("relay", "pause", "orders", "--why"),
    ("relay", "pause", "orders", "--why", "x", "--for"), ("relay", "pause", "orders", "--why", "x", "--key"),
    ("relay", "resume"), ("quarantine", "list", "--topic"), ("quarantine", "release", "--yes"),
    ("quarantine", "skip", "--yes", "orders"), ("messages", "list", "--topic"), ("messages", "list", "--limit"),
    ("messages", "list", "--state"), ("messages", "cancel", "--yes", "--why", "x"), ("prune", "--dry-run"),
    ("db", "check"), ("db", "sql", "--dialect"), ("consume",), ("saga", "list"), ("saga", "show"),
    ("init", "--dry-run", "--topic"), ("healthcheck", "--timeout"), ("schema", "check"), ("schema", "diff"),
]  # fmt: skip


def test_no_argument_is_an_error_that_nobody_expected(
    outboxkit: Outboxkit, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}\n")))
    rng, wrong = random.Random(4711), []
    codes = {int(code) for code in Exit}
    for _ in range(100_000 if FULL else 250):
        command = rng.choice(COMMANDS)
        arguments = [*command, *(rng.choice(HOSTILE) for _ in range(rng.randrange(3)))]
        done = outboxkit(*arguments)
        is_wrong = done.code not in codes or "outboxkit: unexpected" in done.err or "Traceback" in done.err
        if is_wrong or CANARY in done.out + done.err.replace(repr(arguments), ""):
            wrong.append((arguments, done.code, done.err[-300:]))
    assert "\n".join(map(repr, wrong)) == ""
    _resume_all(outboxkit, engine)


def _resume_all(outboxkit: Outboxkit, engine: Engine) -> None:
    """Takes every pause in force back, as a person does who reads `relay pauses`."""
    with engine.connect() as connection:
        held = pauses.pauses(connection)
    for target in [pause.target for pause in held]:
        key = [] if target.key is None else ["--key", _typed(target.key)]
        where = ["--type", target.name] if target.scope is Scope.TYPE else [*key, "--", target.name]
        assert outboxkit("relay", "resume", *where).code == Exit.OK, target
    with engine.connect() as connection:
        assert pauses.pauses(connection) == []


def _typed(key: bytes) -> str:
    return "".join(chr(byte) if 32 < byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in key)


def test_no_setting_is_an_error_that_nobody_expected(tmp_path: Path) -> None:
    rng, file = random.Random(4711), tmp_path / "outboxkit.toml"
    values: list[Any] = [
        *(one for one in HOSTILE if one.isprintable()),
        0,
        -1,
        10**12,
        1.5,
        float("nan"),
        True,
        [],
        {},
        ["x"],
    ]
    wrong = []
    for _ in range(100_000 if FULL else 300):
        content = _random_settings(rng, values)
        file.write_text("\n".join(f"{_toml(name)} = {_toml(value)}" for name, value in content.items()))
        try:
            load(file)
        except ConfigurationError as error:
            if CANARY in (shown := redaction.escaped(redaction.redacted(error.message))) or "\n" in shown:
                wrong.append((content, shown))
        except Exception as error:  # noqa: BLE001  that is what is looked for
            wrong.append((content, repr(error)))
    assert "\n".join(map(repr, wrong)) == ""


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(name)} = {_toml(inner)}" for name, inner in value.items()) + "}"
    return "nan" if isinstance(value, float) and value != value else json.dumps(value)  # noqa: PLR0124


def _random_settings(rng: random.Random, values: list[Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*Settings.model_fields, "database", "nonsense"])
        section = getattr(Settings.model_fields.get(name), "annotation", None)
        fields = list(getattr(section, "model_fields", ())) or ["orders", "a.b", "url"]
        inner = {rng.choice([*fields, "nonsense"]): rng.choice(values) for _ in range(rng.randrange(3))}
        content[name] = rng.choice([rng.choice(values), inner, {"x": inner}])
    return content


def test_no_control_row_hinders_what_is_not_paused_and_each_can_be_taken_away(
    outboxkit: Outboxkit, engine: Engine
) -> None:
    rng, control = random.Random(4711), tables.outbox_control
    name = uuid4().hex
    for good in range(1_000 if FULL else 5):
        with engine.begin() as connection:
            connection.execute(text("PRAGMA ignore_check_constraints = ON"))
            for _ in range(20):
                connection.execute(insert(control).values(**_random_pause(rng)))
            connection.execute(text("PRAGMA ignore_check_constraints = OFF"))
            outbox.write(connection, [message(good, key="good", topic="clear")])
        for command in (("status",), ("relay", "pauses"), ("relay", "pauses", "--json")):
            done = outboxkit(*command)
            assert done.code in (Exit.OK, Exit.PROBLEMS), done.err
        with relaying(engine, open_publisher(f"memory://{name}", {})):
            until(partial(_has_come, name, good + 1))
        _resume_all(outboxkit, engine)
        with engine.begin() as connection:
            connection.execute(control.delete())


def _has_come(name: str, number: int) -> bool:
    return len(memory.exchange(name).messages("clear")) == number


def _random_pause(rng: random.Random) -> dict[str, Any]:
    instants = [
        "infinity",
        "garbage",
        "20000-01-01 00:00:00",
        "2026-01-01 00:00:00.000000",
        "9999-12-31 00:00:00.000000",
        None,
    ]
    texts = [one for one in HOSTILE if "\udc80" not in one and one != "*"]
    return {
        "scope": rng.choice(["destination", "type", "key", "world", ""]),
        "target": rng.choice(texts),
        "reason": rng.choice(texts),
        "set_by": rng.choice(texts),
        "until": text(f"'{at}'") if (at := rng.choice(instants)) else None,
    }
