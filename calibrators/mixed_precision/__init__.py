"""Choose bits per layer within a budget."""
