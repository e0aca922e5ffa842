"""Observe: statistics, health and metrics of a relay."""
