"""Habits that a type checker cannot see: where time, chance, the environment and broad excepts may appear."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT, calls, files, functions, imported, nodes, place

CORES = files(
    "outboxkit/avro",
    "outboxkit/consumer/core.py",
    "outboxkit/consumer/envelopes.py",
    "outboxkit/consumer/observe/order_check.py",
    "outboxkit/consumer/protocol.py",
    "outboxkit/guards/circuit_breaker.py",
    "outboxkit/guards/policy.py",
    "outboxkit/guards/token_bucket.py",
    "outboxkit/headers.py",
    "outboxkit/message.py",
    "outboxkit/policy.py",
    "outboxkit/rows.py",
    "outboxkit/saga/core.py",
    "relay/outboxkit_relay/core",
)

# Around one message (its headers and the user's extractors, its handler, our SQL about it), around leaving; where an
# outage is told from other errors; around one relay cycle, around the reset of a publisher, in the command line's main.
BROAD_EXCEPTS = {
    "outboxkit/brokers/kafka/publish.py",
    "outboxkit/brokers/rabbitmq/channel.py",
    "outboxkit/brokers/rabbitmq/destination.py",
    "outboxkit/consumer/reading.py",
    "outboxkit/consumer/run.py",
    "outboxkit/consumer/settle.py",
    "outboxkit/consumer/transactions.py",
    "relay/outboxkit_relay/daemon/db_thread.py",
    "relay/outboxkit_relay/daemon/embedded.py",
    "relay/outboxkit_relay/daemon/publishers.py",
    "relay/outboxkit_relay/cli/__init__.py",
    "relay/outboxkit_relay/cli/dlq/repair.py",
}


@pytest.mark.parametrize("file", CORES, ids=place)
def test_a_core_takes_time_and_chance_as_arguments(file: Path) -> None:
    clocks = {"time", "random", "secrets", "asyncio", "threading"} & {name.split(".")[0] for name in imported(file)}
    reads = [place(file, call) for name, call in calls(file) if name.endswith((".now", ".utcnow", ".today", "uuid4"))]

    allowed = {"random"} if _only_types_of(file, "random") else set()
    assert not clocks - allowed
    assert not reads


def _only_types_of(file: Path, module: str) -> bool:
    """A parameter `rng: random.Random` names the type; calling anything of the module would be a second source."""
    used = {ast.unparse(node) for node in nodes(file) if isinstance(node, ast.Attribute)}
    return not {name for name in used if name.startswith(f"{module}.")} - {f"{module}.Random"} and not any(
        name.startswith(f"{module}.") for name, _ in calls(file)
    )


def test_broad_excepts_stand_at_the_named_boundaries_only() -> None:
    found = {
        place(file)
        for file in files()
        for node in nodes(file)
        if isinstance(node, ast.ExceptHandler) and _is_broad(node)
    }

    assert found == BROAD_EXCEPTS


def _is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether it may swallow anything; what ends in a raise, or hands the error to a future, swallows nothing."""
    kinds = {ast.unparse(node) for node in ast.walk(handler.type)} if handler.type else {"BaseException"}
    last = handler.body[-1]
    passed_on = isinstance(last, ast.Raise) or ast.unparse(last).endswith(f".set_exception({handler.name})")
    return bool(kinds & {"Exception", "BaseException"}) and not passed_on


def test_sql_text_is_never_assembled() -> None:
    assert not [
        place(file, call)
        for file in files()
        for name, call in calls(file)
        if name.split(".")[-1] in {"text", "exec_driver_sql"} and call.args and _is_assembled(call.args[0])
    ]


def _is_assembled(argument: ast.expr) -> bool:
    if isinstance(argument, ast.JoinedStr):
        return True
    if isinstance(argument, ast.BinOp):
        return any(not isinstance(part, ast.Constant) for part in (argument.left, argument.right))
    return isinstance(argument, ast.Call) and ast.unparse(argument.func).endswith(".format")


def test_nothing_is_unpickled_or_evaluated() -> None:
    loaders = [place(file) for file in files() if {"pickle", "marshal", "shelve", "dill"} & imported(file)]
    evaluated = [place(file, call) for file in files() for name, call in calls(file) if name in {"eval", "exec"}]

    assert not loaders + evaluated


def test_the_environment_is_read_in_one_place() -> None:
    def reads(file: Path) -> Iterator[str]:
        names = {"environ", "getenv"}
        return (place(file, node) for node in nodes(file) if isinstance(node, ast.Attribute) and node.attr in names)

    settings = ROOT / "relay" / "outboxkit_relay" / "settings.py"
    assert not [where for file in files() if file != settings for where in reads(file)]
    assert not [place(file) for file in files() if file != settings and {"os.environ", "os.getenv"} & imported(file)]


def test_nothing_sleeps_in_an_async_function_but_asyncio() -> None:
    assert not [
        place(file, node)
        for file in files()
        for function in functions(file)
        if isinstance(function, ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "time.sleep"
    ]
