"""Programs as LiteRT files."""
