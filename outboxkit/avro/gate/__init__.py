"""Gate: a new schema against everything that is stored."""
