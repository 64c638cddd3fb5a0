"""What of an artifact an execution provider of ONNX Runtime leaves to the host."""
