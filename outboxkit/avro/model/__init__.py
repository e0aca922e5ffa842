"""Model: schemas as frozen nodes, from text to canonical form."""
