"""Fold linear branches and batch norms into single operators, with proof."""
