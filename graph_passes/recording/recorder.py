"""Recording the calls of a model, with nothing known of its sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from calicache.graph_passes.recording.recording import Recording


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Keep the inputs of every call of `model` made inside the `with` block.

    Args:
        model: the denoiser that the user's sampler or pipeline calls.

    Yields:
        A Recording that grows with every call.

    Examples:
        >>> with record(pipe.transformer) as recording:
        ...     pipe(class_labels=[1, 2], num_inference_steps=50)
    """
    recording = Recording()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording.append(module, args, kwargs)

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield recording
    finally:
        handle.remove()
