"""Alert rules and the board: the rules' own tests pass, and they ask for nothing that is not there."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ALERTS = ROOT / "relay" / "prometheus" / "alerts.yml"
BOARD = ROOT / "relay" / "dashboards" / "outboxkit.json"
PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text()
RUNBOOKS = (ROOT / "docs" / "operate" / "runbooks.md").read_text()


def documented() -> set[str]:
    return set(re.findall(r"^\| `(outboxkit_\w+)`", PAGE, re.MULTILINE))


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def queries() -> Iterator[str]:
    yield from (rule["expr"] for rule in rules())
    for panel in json.loads(BOARD.read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


@pytest.mark.parametrize(
    "command", [["check", "rules", str(ALERTS)], ["test", "rules", f"{ALERTS.parent}/alerts_test.yml"]]
)
def test_the_rules_are_valid_and_fire_when_they_should(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_query_asks_for_a_documented_metric() -> None:
    asked = {name for query in queries() for name in re.findall(r"\boutboxkit_\w+", query)}

    assert asked
    assert {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked} <= documented()


def test_numbers_of_the_whole_database_are_not_summed_over_relays() -> None:
    """Three relays report the same backlog: a sum would say three times as much."""
    shared = "outboxkit_(outbox_|dead_letters|database_up|destination_paused|circuit_state)"

    assert not [query for query in queries() if re.search(rf"sum( by \([^)]*\))? ?\({shared}", query)]


def test_every_alert_has_a_test_and_a_runbook() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    tested = set(re.findall(r"alertname: (\w+)", (ALERTS.parent / "alerts_test.yml").read_text()))
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", RUNBOOKS, re.MULTILINE)
    }

    assert {rule["alert"] for rule in alerts} == tested
    assert {rule["annotations"]["runbook"].partition("#")[2] for rule in alerts} <= anchors
