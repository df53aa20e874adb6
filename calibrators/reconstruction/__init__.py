"""Train or round weights unit by unit."""
