"""The three ONNX layouts, and what they are built from."""
