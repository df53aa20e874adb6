"""Fold linear branches and batch norms into single operators, and check every fold."""
