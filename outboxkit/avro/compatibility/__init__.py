"""Compatibility: every reason why a reader cannot read a writer's data.

Reading order: `matching` (which parts are compared, as decoders choose them), `check` (the comparison), `problems`
(what it reports), `logical_change`, `examples` (the smallest value that fails), `history` (the modes of a registry).
"""
