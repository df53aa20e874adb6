"""The reference program: the graph with quantize and dequantize operators, and the frozen codes."""
