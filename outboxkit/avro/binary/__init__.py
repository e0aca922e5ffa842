"""Binary: guarded decoding and encoding of hostile bytes."""
