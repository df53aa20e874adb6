"""onnxruntime: sessions, executed kernels, lint rules, the simplifier."""
