"""Write the reference program as QDQ ONNX."""
