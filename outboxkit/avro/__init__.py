"""Pure Avro rules: parse, canonical form and fingerprints, compatibility, frames. No I/O, no codec, no registry.

The five calls that the rest of outboxkit uses::

    schema = parse(text)                          # frozen nodes, or SchemaError with a JSON pointer
    problems = check(reader, writer)              # every reason why reader cannot read writer's data
    digest = fingerprint(schema)                  # CRC-64-AVRO, 8 bytes in wire order; .hex() for headers
    frame = read_frame(data, headers)             # which schema wrote this message, and its body
    data, headers = write_frame(kind, body, …)    # the reverse

A message can be replayed for a reader when ``not any(p.is_error for p in check(reader, writer))``; each problem's
``reader_path`` names the offending field and ``fix`` the repair.
"""

from outboxkit.avro.compatibility.check import check, compatible
from outboxkit.avro.compatibility.history import Mode, Version, check_history
from outboxkit.avro.compatibility.problems import Direction, Problem, ProblemKind, Severity
from outboxkit.avro.frames import Frame, FrameKind, body_of, framed_body, read_frame, write_frame
from outboxkit.avro.model.canonical import canonical_form, fingerprint, full_form, identity
from outboxkit.avro.model.nodes import Schema
from outboxkit.avro.model.parse import parse

__all__ = [
    "Direction",
    "Frame",
    "FrameKind",
    "Mode",
    "Problem",
    "ProblemKind",
    "Schema",
    "Severity",
    "Version",
    "body_of",
    "canonical_form",
    "check",
    "check_history",
    "compatible",
    "fingerprint",
    "framed_body",
    "full_form",
    "identity",
    "parse",
    "read_frame",
    "write_frame",
]
