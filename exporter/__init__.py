"""From model to artifact."""
