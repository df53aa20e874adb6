"""Execute the graph in blocks: streamed activations, simulated quantization, losses."""
