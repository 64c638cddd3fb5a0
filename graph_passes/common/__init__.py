"""Errors, files, digests and rejections: what every room stands on."""
