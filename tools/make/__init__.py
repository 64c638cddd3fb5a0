"""What leads from a model to an artifact: measured seconds, a plan, another point of it, ONNX."""
