"""Compare two exports: accuracy by sample, size, speed, layers, settings and origins."""
