"""Read calibration and evaluation data."""
