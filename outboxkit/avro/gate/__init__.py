"""Gate: a new schema against everything that is stored.

Reading order: `evaluate` (findings, dated exceptions, the result), `lint` (habits that make a change hard),
`reports` (text, JSON, GitHub, JUnit), `json_lines` (the line of a place in a file).
"""
