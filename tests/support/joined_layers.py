"""A few layers joined by whatever path a test draws, captured and classified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import flatten_call

CHANNELS = 4
Forward = Callable[..., Any]


class JoinedLayers(nn.Module):
    """Some layers; `path` says how they are joined, which is all that matters here."""

    def __init__(self, path: Forward) -> None:
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(CHANNELS, CHANNELS))
        self.norm = nn.LayerNorm(CHANNELS)
        self.matrix = nn.Parameter(torch.randn(CHANNELS, CHANNELS))
        self.path = path

    def forward(self, x: Tensor, text: Tensor) -> Any:
        return self.path(self, x, text)


def joined_graph(
    path: Forward, shape: tuple[int, ...] = (2, 3, CHANNELS)
) -> tuple[CapturedGraph, dict[str, Dependence]]:
    """The captured graph of joined layers and its classes: x is latent, text is run."""
    model = JoinedLayers(path).eval()
    call = flatten_call(model, (torch.randn(shape), torch.randn(2, 5, CHANNELS)), {})
    captured = capture(model, call.signature())
    inputs = {"x": Dependence.LATENT, "text": Dependence.RUN}
    return captured, classify_nodes(captured, inputs)
