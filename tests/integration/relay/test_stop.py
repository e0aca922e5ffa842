"""A relay in a process's main thread, where signals are handled."""

from __future__ import annotations

import os
import signal
import threading
from datetime import timedelta
from pathlib import Path

from outboxkit_relay.core.state import RelayConfig
from outboxkit_relay.daemon.relay import RelayDaemon
from tests.integration.relay.world import ScriptedPublisher, engine_for, until

SIGNALS = 20


def test_a_relay_goes_on_after_a_signal_whose_handler_takes_longer_than_its_pauses(tmp_path: Path) -> None:
    engine, stop, never = engine_for(f"sqlite:///{tmp_path}/outbox.db"), threading.Event(), threading.Event()
    relay = RelayDaemon(engine, ScriptedPublisher(), RelayConfig(slow=timedelta(milliseconds=5)))

    def interrupt() -> None:
        for _ in range(SIGNALS):
            reads = relay.state.reads
            until(lambda: relay.state.reads > reads, "it reads")  # noqa: B023  at once
            os.kill(os.getpid(), signal.SIGUSR1)
        stop.set()

    before = signal.signal(signal.SIGUSR1, lambda *_: never.wait(0.02))
    interrupting = threading.Thread(target=interrupt)
    try:
        interrupting.start()
        relay.run(stop)
    finally:
        signal.signal(signal.SIGUSR1, before)
        interrupting.join()
        engine.dispose()

    assert relay.state.left
