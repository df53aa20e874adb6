"""Accuracy, latency and size."""
