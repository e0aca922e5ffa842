"""Diagnosis on the command line: draws what `outboxkit_relay.diagnose` finds."""
