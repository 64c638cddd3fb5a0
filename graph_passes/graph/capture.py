"""From an nn.Module to one functional fx graph, with `aten.linear` and SDPA kept whole."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.errors import CaptureError, reason_of
from calicache.graph_passes.common.offloading import input_device, is_offloaded
from calicache.graph_passes.common.shards import WeightShard, check_tokens, split_layers
from calicache.graph_passes.graph.forms import write_out_forms
from calicache.graph_passes.graph.surgery import (
    find_node,
    finish,
    module_path,
    read_attribute,
)
from calicache.graph_passes.recording.reads import DIFFERENT, answering
from calicache.graph_passes.recording.signature import CallSignature

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """A model as a graph of pure functions.

    Attributes:
        module: placeholders are the tensors of `signature` in order, the output is a flat
            tuple, weights are the model's own tensors under their own names.
        signature: the form of the call the graph was captured for.
        output_tree: how the flat outputs become the model's return value.
        fixed: tensors of the signature whose recorded values are built into the graph.
        shards: which part of a weight this process has, by the weight's name, for those that are
            split over several.
    """

    module: fx.GraphModule
    signature: CallSignature
    output_tree: pytree.TreeSpec
    fixed: tuple[str, ...] = ()
    shards: Mapping[str, WeightShard] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The graph of `module`."""
        return self.module.graph

    @property
    def device(self) -> torch.device:
        """Where calls are run; the CPU for a model without weights."""
        return input_device(self.module)

    def node(self, name: str) -> fx.Node:
        """The node of that name."""
        return find_node(self.graph, name)

    def attribute(self, target: str) -> Tensor:
        """The weight or buffer a `get_attr` node names."""
        value = read_attribute(self.module, target)
        assert isinstance(value, Tensor)
        return value

    def whole_attribute(self, target: str) -> Tensor:
        """The same with the parts of all processes, which have to ask at the same time."""
        value, shard = self.attribute(target), self.shards.get(target)
        return shard.whole(value) if shard else value


def capture(model: nn.Module, signature: CallSignature, reads: str = "[]") -> CapturedGraph:
    """Trace the model for calls of one form.

    Args:
        model: in eval mode; may be on the meta device.
        signature: from a recorded recording.
        reads: what the model read off its tensors in every recorded call, from `find_reads`.

    Raises:
        CaptureError: the model is none, in training mode, spread in a way that no graph follows,
            or torch.export cannot take it; its reason is passed on.
    """
    of_kind("model", model, nn.Module, CaptureError)
    of_kind("signature", signature, CallSignature, CaptureError)
    _check_mode(model)
    _check_places(model)
    check_tokens(model)
    written_out, shards = split_layers(model)
    exported, module = _export(written_out, signature, reads)
    _check_training(model, module.graph)
    _check_changes(model, exported)
    output_tree, _ = exported.call_spec.out_spec.children()
    flat, fixed = _flat_module(module, signature, output_tree.num_leaves)
    _check_shapes(model, flat.graph)
    return CapturedGraph(flat, signature, output_tree, fixed, shards)


def _export(
    model: nn.Module, signature: CallSignature, reads: str
) -> tuple[ExportedProgram, fx.GraphModule]:
    """What torch.export makes of the model, and its module."""
    device = input_device(model)
    examples = [torch.zeros(s.shape, dtype=s.torch_dtype, device=device) for s in signature.tensors]
    arguments = signature.unflatten(examples)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(_answered(model, reads), (), arguments, strict=False)
            # An empty table makes the graph functional and decomposes nothing.
            exported = exported.run_decompositions({})
            module = exported.module(check_guards=False)
    except Exception as error:
        raise CaptureError(
            type(model).__name__,
            expected="a model that torch.export captures",
            got=reason_of(error),
            fix="A graph cannot follow sizes and branches that differ from call to call, and this "
            "model reads such values (see the chained error)."
            if reads == DIFFERENT
            else "Remove what torch.export cannot trace (see the chained error), or plan with "
            "REFRESH and FORECAST steps alone: those run the model whole, cast or offloaded.",
        ) from error
    assert isinstance(module, fx.GraphModule)
    return exported, module


def _check_mode(model: nn.Module) -> None:
    if model.training:
        raise _not_in_eval_mode(model, "training mode")


def _check_places(model: nn.Module) -> None:
    """Refuse weights that accelerate or others have spread over devices."""
    devices = {str(value.device) for value in model.parameters()}
    offloaded = is_offloaded(model)
    if offloaded or len(devices) > 1:
        raise CaptureError(
            type(model).__name__,
            expected="weights on one device, all in its memory",
            got="some that hooks of accelerate keep elsewhere"
            if offloaded
            else f"some on each of {', '.join(sorted(devices))}",
            fix="Plan with REFRESH and FORECAST steps alone, which run the model whole, or put it "
            "on one device.",
        )


def _check_training(model: nn.Module, graph: fx.Graph) -> None:
    """Refuse what computes otherwise in training: a flag alone, as in peft's layers, is nothing."""
    for node in graph.nodes:
        if node.op == "call_function" and _is_training(node):
            raise _not_in_eval_mode(model, f"{node.target} in {module_path(node) or 'forward'}")


def _is_training(node: fx.Node) -> bool:
    """Whether it drops out, or norms by the batch that it is given."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    trains = given.get("train") is True or given.get("training") is True
    share = given.get("p", given.get("dropout", 1))
    return (trains and share != 0) or bool(given.get("dropout_p"))


def _not_in_eval_mode(model: nn.Module, got: str) -> CaptureError:
    return CaptureError(
        type(model).__name__,
        expected="a model in eval mode",
        got=got,
        fix="Call model.eval() first.",
    )


def _check_changes(model: nn.Module, exported: ExportedProgram) -> None:
    changed = [
        str(spec.target or getattr(spec.arg, "name", spec.arg))
        for spec in exported.graph_signature.output_specs
        if spec.kind in (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    ]
    if changed:
        raise CaptureError(
            type(model).__name__,
            expected="a model that changes no input and no buffer",
            got=f"a change of {', '.join(changed)}",
            fix="Write the new value to a new tensor in forward.",
        )


def _answered(model: nn.Module, reads: str) -> nn.Module:
    """A copy over the same weights, its reads answered; also returns the tensors it read."""
    forward = model.forward
    copied = copy.copy(model)

    @functools.wraps(forward)
    def answered(*args: Any, **kwargs: Any) -> tuple[Any, list[Tensor]]:
        with answering(reads) as seen, _Detached():
            result = forward(*args, **kwargs)
        return result, seen

    copied.forward = answered
    return copied


class _Detached(TorchFunctionMode):
    """`x.data` as `x.detach()`: the tracer loses what is written to the first.

    CogVideoX writes its positions so, for sizes that it was not made for.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]


def _check_shapes(model: nn.Module, graph: fx.Graph) -> None:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and not all(type(size) is int for size in value.shape):
            raise CaptureError(
                type(model).__name__,
                expected="shapes that the shapes of the inputs give",
                got=f"{node.name} ({module_path(node) or node.target}) of {tuple(value.shape)}, "
                "which depends on values",
                fix="Record calls that agree in what decides these sizes, such as masks; a size "
                "that the latent decides cannot be kept.",
            )


def _flat_module(
    module: fx.GraphModule, signature: CallSignature, outputs: int
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Copy with plain placeholders and outputs; asserts, guards and dead code are left out.

    Also returns the tensors that decide what the model read; the outputs after the model's own
    are the values it read.
    """
    source = module.graph
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    tensors = {spec.name for spec in signature.tensors}
    by_input: dict[str, fx.Node] = {}
    placeholders = [node for node in source.nodes if node.op == "placeholder"]
    for name, node in zip(signature.order, placeholders, strict=True):
        if name in tensors:
            copies[node] = graph.node_copy(node)
            by_input[name] = node
    output: Any = None
    for node in source.nodes:
        if node.op == "output":
            output = node.args[0]
        elif node.target is aten.detach.default:  # the same value, without gradients
            copies[node] = copies[node.args[0]]
        elif node not in copies and (node.op != "placeholder"):
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    flat, read = pytree.tree_leaves(output)[:outputs], pytree.tree_leaves(output)[outputs:]
    graph.output(tuple(fx.node.map_arg(leaf, lambda n: copies[n]) for leaf in flat))
    written = write_out_forms(graph)
    read = [copies[node] for node in read if isinstance(node, fx.Node)]
    deciding = _inputs_of([written.get(node, node) for node in read])
    fixed = tuple(name for name, node in by_input.items() if copies[node] in deciding)
    return fx.GraphModule(module, finish(graph), class_name="Captured"), fixed


def _inputs_of(nodes: list[fx.Node]) -> set[fx.Node]:
    """The placeholders that some nodes are computed from."""
    seen: set[fx.Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes.extend(node.all_input_nodes)
    return {node for node in seen if node.op == "placeholder"}
