"""Daemon: threads and processes around the core."""
