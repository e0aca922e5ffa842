"""``python -m outboxkit_relay`` is ``outboxkit``."""

from outboxkit_relay.cli import main

main()
