"""Toy functions and layers as captured graphs, and what ONNX Runtime makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor, fx, nn

from calicache.export.translation.translate import translate
from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.graph.surgery import finish
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import flatten_call
from calicache.graph_passes.sites.branches import ResidualBranch

CHANNELS = 4
Forward = Callable[..., Any]
Classified = tuple[CapturedGraph, dict[str, Dependence]]


class Toy(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def captured(model: nn.Module | Callable[..., Any], *inputs: Tensor) -> CapturedGraph:
    """What the compiler's passes are given."""
    model = model if isinstance(model, nn.Module) else Toy(model)
    return capture(model.eval(), flatten_call(model, inputs, {}).signature())


def trace(model: nn.Module | Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The module of `captured`: its output is a flat tuple."""
    return captured(model, *inputs).module


def targets(module: fx.GraphModule) -> list[Any]:
    """The operations of a graph, in order."""
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def written(module: fx.GraphModule) -> tuple[str, dict[str, str]]:
    """A graph and what its nodes say of their values, to see that neither changes."""
    return str(module.graph), {n.name: str(n.meta.get("val")) for n in module.graph.nodes}


def as_pairs(value: Tensor) -> Tensor:
    """Complex values as ONNX takes them."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def run_onnx(module: fx.GraphModule, *inputs: Tensor) -> list[Tensor]:
    """Results of the exported graph on ONNX Runtime's CPU provider."""
    model = translate({"toy": module})["toy"]
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    names = [value.name for value in session.get_inputs()]
    feed = dict(zip(names, (as_pairs(value).numpy() for value in inputs), strict=True))
    return [torch.from_numpy(value) for value in session.run(None, feed)]


def op_types(model: ir.Model) -> Iterator[str]:
    """The operators of an exported graph, in order."""
    return (node.op_type for node in model.graph)


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


def classified(model: nn.Module, shape: tuple[int, ...] = (2, 3, CHANNELS)) -> Classified:
    """The captured graph of a model of (x, text) and its classes: x is latent, text is run."""
    call = flatten_call(model.eval(), (torch.randn(shape), torch.randn(2, 5, CHANNELS)), {})
    captured = capture(model, call.signature())
    inputs = {"x": Dependence.LATENT, "text": Dependence.RUN}
    return captured, classify_nodes(captured, inputs)


def joined_graph(path: Forward, shape: tuple[int, ...] = (2, 3, CHANNELS)) -> Classified:
    """The captured graph of joined layers and its classes."""
    return classified(JoinedLayers(path), shape)


def left_without(graph: fx.Graph, branch: ResidualBranch) -> set[str]:
    """Names of the nodes that are needed where the branch's exits are inputs."""
    copies: dict[fx.Node, fx.Node] = {}
    rest = fx.Graph()
    rest.output(rest.graph_copy(graph, copies))
    for last in [copies[node] for node in copies if node.name in branch.exits]:
        with rest.inserting_before(last):
            cached = rest.placeholder("cached")
        last.replace_all_uses_with(cached)
    return {node.name for node in finish(rest).nodes}
