"""Core: what the relay does next, decided without clock, chance or I/O."""
