"""Rewrite the float model before calibration, and correct biases after it."""
