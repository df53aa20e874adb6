"""Compare a runtime with the reference at every quantized value."""
