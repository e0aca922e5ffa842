"""The bank: somebody else's service, behind a guard. It forgets nothing, and takes one operation once."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from outboxkit import full_jitter
from outboxkit.guards import CircuitRule, guard


class BankAway(Exception):
    """No answer."""


@dataclass
class Bank:
    """Accounts by idempotency key; ``outage`` calls get no answer, orders in ``poor`` are declined."""

    outage: int = 0
    poor: frozenset[int] = frozenset()
    held: dict[str, int] = field(default_factory=dict)

    def hold(self, key: str, order_id: int, amount: int) -> bool:
        """Holds an amount; the same key holds it once."""
        self._answer()
        if order_id in self.poor:
            return False
        self.held.setdefault(key, amount)
        return True

    def void(self, key: str) -> None:
        """Gives it back; what was never held is nothing to give back."""
        self._answer()
        self.held.pop(key, None)

    def _answer(self) -> None:
        if self.outage > 0:
            self.outage -= 1
            raise BankAway


bank = Bank()

# A slow or broken bank takes no more than this: two seconds a call, four calls at a time, and none at all for a moment
# when half of the calls fail.
guarded = guard(
    "bank",
    timeout="2s",
    retry=full_jitter("20ms", cap="200ms", attempts=2),
    breaker=CircuitRule(
        failure_rate=0.5, window=timedelta(seconds=10), open_for=timedelta(milliseconds=500), min_messages=4
    ),
    bulkhead=4,
    on=BankAway,
)

hold = guarded(bank.hold)
void = guarded(bank.void)
