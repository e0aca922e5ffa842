"""Commands on schemas."""
