"""What the integers mean, and how they are chosen."""
