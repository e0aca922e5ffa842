"""What the authors of plugs, and users, test with: conformance suites that every adapter of ours passes too.

``broker_conformance``: for a new broker. Each suite is a class of pytest tests over one small harness object.
``plugin``: for applications: pytest fixtures for what they emit and what their handlers do.
"""
