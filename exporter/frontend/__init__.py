"""Load a model and capture it as one ATen graph."""
