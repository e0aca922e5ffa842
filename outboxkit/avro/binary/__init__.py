"""Binary: guarded decoding and encoding of hostile bytes.

Reading order: `guard` (bytes are measured before a decoder sees them), `resolution` and `promotions` (a writer's data
for a reader), `scalars`, `union_branch`, `prepare` (values checked before they are written), `locate` (the first fault
and its path), `json_values` (what people see of it).
"""
