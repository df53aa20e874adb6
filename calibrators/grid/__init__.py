"""The integer grid: what a quantized tensor is, and the only copy of the quantization formula."""
