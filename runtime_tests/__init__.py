"""The proof: the runtime against the reference."""
