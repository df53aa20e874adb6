"""Choose scales and zero points from streamed statistics."""
