"""Running an artifact in ONNX Runtime."""
