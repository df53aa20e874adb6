"""Sweeps: every combination of some settings as a list of exports, run by processes and gathered into one table."""
