"""Graphs in forms that torch.onnx takes and ONNX Runtime runs well: one rewrite a file."""
