"""Invariants of the graph, run between stages: what holds here, every later stage relies on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.checks import defect, is_inner_graph, verify_functional
from calicache.graph_passes.graph.surgery import graph_outputs, shape_of
from calicache.graph_passes.rewriting.variants import Variant, VariantSet
from calicache.graph_passes.settings.choices import StepMode


def verify_variants(captured: CapturedGraph, variant_set: VariantSet) -> VariantSet:
    """Check the variants against the plain graph and each other, and hand them on.

    Raises:
        VerifyError: a variant takes or returns something else than it must.
    """
    values = {name: (c.shape, c.dtype) for name, (c, _) in variant_set.slots().items()}
    values |= dict.fromkeys(variant_set.tables, ((), torch.float32))
    plain = _output_forms(captured.graph)
    for mode, variant in variant_set.variants.items():
        verify_functional(variant.module.graph)
        allowed = values
        if mode is StepMode.REFRESH:  # of all caches, only kept outputs are there to be mixed
            held = {name for name, (c, _) in variant_set.slots().items() if not c.is_output}
            allowed = {name: form for name, form in values.items() if name not in held}
        _verify_placeholders(captured, variant, allowed)
        _verify_writes(variant, variant_set)
        by_name = {cache.name: (cache.shape, cache.dtype) for cache in variant_set.caches}
        expected = [*plain, *(by_name[name] for name in variant.writes)]
        forms = _output_forms(variant.module.graph)
        if forms != expected:
            raise defect(f"outputs of {mode.name}", str(expected), str(forms))
        _verify_attributes(variant)
    return variant_set


def _verify_writes(variant: Variant, variant_set: VariantSet) -> None:
    caches = variant_set.caches
    if variant.mode is not StepMode.REFRESH:
        keeps = variant.mode.keeps_output
        caches = tuple(cache for cache in caches if cache.is_output and keeps)
    names = tuple(cache.name for cache in caches)
    if variant.writes != names:
        raise defect(f"caches of {variant.mode.name}", str(names), str(variant.writes))


def _verify_placeholders(
    captured: CapturedGraph,
    variant: Variant,
    values: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
) -> None:
    arguments = len(captured.signature.tensors)
    placeholders = [node for node in variant.module.graph.nodes if node.op == "placeholder"]
    names = tuple(str(node.target) for node in placeholders[arguments:])
    if names != variant.reads:
        raise defect(f"placeholders of {variant.mode.name}", str(variant.reads), str(names))
    for node in placeholders[arguments:]:
        form = (shape_of(node), node.meta["val"].dtype)
        if values.get(str(node.target)) != form:
            raise defect(
                node.name, "a cache that REFRESH writes, or a weight from a table", str(form)
            )


def _verify_attributes(variant: Variant) -> None:
    for node in variant.module.graph.nodes:
        if node.op == "get_attr":
            value: object = variant.module
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            if isinstance(value, fx.GraphModule) and is_inner_graph(node):
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != shape_of(node):
                raise defect(node.name, f"a tensor {shape_of(node)}", repr(type(value).__name__))


def _output_forms(graph: fx.Graph) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    return [
        (shape_of(value), value.meta["val"].dtype)
        if isinstance(value, fx.Node) and _is_tensor(value)
        else None
        for value in graph_outputs(graph)
    ]


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
