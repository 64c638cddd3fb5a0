"""Hoisting: what depends on the step alone is computed for all steps at once, before the run.

An exact pass. Timestep embedders and adaLN modulation are a third of a DiT's weights and are
read again at every step, for a handful of rows. All steps of a plan are known, so one pass over
these weights makes the values of all of them; a step looks its own up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from calicache.export.lowerings.reshapes import views_to_reshapes
from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.graph.operations import LINEAR, before_views
from calicache.graph_passes.graph.surgery import copy_graph, finish
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.rewriting.variants import Variant
from calicache.graph_passes.settings.choices import StepMode


@dataclass(frozen=True, slots=True)
class StepValues:
    """What all steps of a run need and the timestep decides.

    Attributes:
        module: takes the model's inputs, those of the step with all steps stacked (T, *shape);
            returns the values, each (T, *shape).
        inputs: names of the model's inputs that it takes, in order.
        values: the value of one step by the name under which variants read it.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    values: Mapping[str, Tensor]


def hoist_steps(
    captured: CapturedGraph,
    dependence: Mapping[str, Dependence],
    variants: Mapping[StepMode, Variant],
    tables: Mapping[str, Tensor],
    samples: int = 1,
) -> tuple[StepValues | None, Mapping[StepMode, Variant]]:
    """Split what the timestep decides off all variants.

    Args:
        captured: the plain graph.
        dependence: class of every tensor argument.
        variants: of the plain graph, by mode.
        tables: the step's inputs for all steps, (T, *shape) each.
        samples: of the batch where its size is left open: memory is counted for one then.

    Returns:
        The values' graph, and variants that read them; None and the same variants where nothing
        is to be had: the values of all steps would take more memory than the weights that they
        replace.
    """
    steps = len(next(iter(tables.values()), ()))
    classes = classify_nodes(captured, dependence)
    frontier = _frontier(captured.graph, classes)
    weights = sum(
        captured.attribute(str(source.target)).nbytes
        for node in captured.graph.nodes
        if node.target is LINEAR and classes[node.name] is Dependence.STEP
        for source in node.all_input_nodes
        if source.op == "get_attr"
    )
    kept = steps * sum(node.meta["val"].nbytes for node in frontier) // samples
    if not kept or kept > weights:
        return None, variants
    values = {_name(node.name): node.meta["val"] for node in frontier}
    hoisted = {mode: _without(variant, frontier) for mode, variant in variants.items()}
    return _stacked(captured, frontier, tables, values), hoisted


def _frontier(graph: fx.Graph, classes: Mapping[str, Dependence]) -> list[fx.Node]:
    """Values of class `step` that others of class `latent` use; before the views of them."""
    frontier: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "output" or classes[node.name] is not Dependence.LATENT:
            continue
        for source in node.all_input_nodes:
            if classes[source.name] is not Dependence.STEP:
                continue
            source = before_views(source)
            if source.op != "placeholder":
                frontier[source] = None
    return list(frontier)


def _without(variant: Variant, frontier: Sequence[fx.Node]) -> Variant:
    """The variant with the frontier's values as further inputs."""
    graph, copies = copy_graph(variant.module.graph)
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    reads = [*variant.reads]
    for source in frontier:
        node = copies.get(source.name)
        if node is None:  # a cheap mode does not need it
            continue
        with graph.inserting_after(last):
            last = graph.placeholder(_name(source.name))
        last.meta["val"] = source.meta["val"]
        node.replace_all_uses_with(last)
        reads.append(_name(source.name))
    module = fx.GraphModule(variant.module, finish(graph), class_name=variant.mode.name.title())
    return replace(variant, module=module, reads=tuple(reads))


def _stacked(
    captured: CapturedGraph,
    frontier: Sequence[fx.Node],
    tables: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
) -> StepValues:
    """The frontier's values for all steps, in one graph without a loop."""
    graph, copies = copy_graph(captured.graph)
    graph.output_node().args = (tuple(copies[node.name] for node in frontier),)
    finish(graph)
    names = [spec.name for spec in captured.signature.tensors]
    arguments = dict(zip(names, [n for n in graph.nodes if n.op == "placeholder"], strict=True))
    for name, node in list(arguments.items()):
        if not node.users:
            graph.erase_node(arguments.pop(name))
    # Values of all steps side by side have strides that a view can forbid.
    plain = views_to_reshapes(fx.GraphModule(captured.module, graph, class_name="OneStep"))
    specs = {spec.name: spec for spec in captured.signature.tensors}
    examples = [
        tables[name].to(captured.device)
        if name in tables
        else torch.zeros(specs[name].shape, dtype=specs[name].torch_dtype, device=captured.device)
        for name in arguments
    ]
    places = tuple(0 if name in tables else None for name in arguments)
    with torch.no_grad():
        module = make_fx(torch.func.vmap(plain, in_dims=places), tracing_mode="real")(*examples)
    placeholders = (node for node in module.graph.nodes if node.op == "placeholder")
    for node, example in zip(placeholders, examples, strict=True):
        node.meta["val"] = example
    return StepValues(module, tuple(arguments), values)


def _name(node: str) -> str:
    return f"step_{node}"
