"""Model: schemas as frozen nodes, from text to canonical form.

Reading order: `nodes` (what a schema is made of), `parse` (from text, with a JSON pointer in every error), `defaults`
(values of their types), `logical_types`, `sizes` (finite, endless, recursive), `canonical` (forms and fingerprints).
"""
