"""The relay daemon and the command line of outboxkit."""
