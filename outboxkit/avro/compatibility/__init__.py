"""Compatibility: every reason why a reader cannot read a writer's data."""
