"""Plans of statements, as the server has carried them out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection

__all__ = ["explained", "looked_at_in_vain", "scanned"]


@contextmanager
def explained(connection: Connection) -> Iterator[list[dict[str, Any]]]:
    """What the server says about each statement of the block: its plan, and how many rows each part has seen."""
    for setting in (
        "LOAD 'auto_explain'",
        "SET auto_explain.log_level = notice",
        "SET auto_explain.log_format = json",
        "SET auto_explain.log_analyze = on",
        "SET auto_explain.log_min_duration = 0",
    ):
        connection.exec_driver_sql(setting)
    plans: list[dict[str, Any]] = []

    def note(diagnostic: Any) -> None:
        _, _, plan = diagnostic.message_primary.partition("plan:\n")
        plans.append(json.loads(plan)["Plan"])

    driver: Any = connection.connection.driver_connection
    driver.add_notice_handler(note)
    try:
        yield plans
    finally:
        driver.remove_notice_handler(note)
        connection.exec_driver_sql("SET auto_explain.log_min_duration = -1")
    assert plans, "void: the server has explained nothing"


def looked_at_in_vain(plans: list[dict[str, Any]]) -> int:
    """Rows that some part of a plan has looked at and thrown away."""
    return sum(
        sum(value for name, value in plan.items() if name.startswith("Rows Removed")) * plan["Actual Loops"]
        + looked_at_in_vain(plan.get("Plans", []))
        for plan in plans
    )


def scanned(plans: list[dict[str, Any]]) -> set[str]:
    """Tables that were read from their first row to the last; a part of a plan that never ran reads nothing."""
    read = (plan for plan in plans if plan["Node Type"] == "Seq Scan" and plan["Actual Loops"])
    found = {str(plan["Relation Name"]) for plan in read}
    return found.union(*(scanned(plan.get("Plans", [])) for plan in plans))
