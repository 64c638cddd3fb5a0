"""Digests of files, tensors and models."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from calicache.graph_passes.common.offloading import stored


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_bytes(value: Tensor) -> memoryview:
    """The values of a tensor as they lie in memory, on the CPU and in order."""
    flat = value.detach().cpu().reshape(-1)
    if flat.stride() != (1,):  # one element may have a stride of 0 and still count as contiguous
        flat = flat.clone(memory_format=torch.contiguous_format)
    flat = flat.view(torch.uint8)
    return memoryview(flat.numpy().data)


def digest(value: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and values."""
    sha = hashlib.sha256(f"{value.dtype} {tuple(value.shape)};".encode())
    sha.update(tensor_bytes(value))
    return sha.hexdigest()


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and saved buffers.

    Where they are does not count: on a device, offloaded by accelerate, or sharded over processes,
    all of which have to ask then.
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # extra state of a module's own making
            continue
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        values = stored(model, name, value)
        if not values.is_meta:
            digest.update(tensor_bytes(_whole(values)))
    return digest.hexdigest()


def _whole(value: Tensor) -> Tensor:
    """All of a tensor, whichever processes it is sharded over: that does not count."""
    whole: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole
