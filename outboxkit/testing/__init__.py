"""Tests for authors of plugs and for users: conformance suites that every adapter of ours passes too, and fixtures.

``broker_conformance``: for a new broker. Each suite is a class of pytest tests over one small harness object.
``plugin``: for applications: pytest fixtures for what they emit and what their handlers do.
"""
