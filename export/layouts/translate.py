"""From an fx graph to an ONNX graph: lowerings, then torch.onnx, then what ONNX Runtime lacks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, fx

from calicache.export.lowerings.attention import fuse_attention
from calicache.export.lowerings.complex import lower_complex
from calicache.export.lowerings.constants import fold_constants
from calicache.export.lowerings.einsum import lower_einsum
from calicache.export.lowerings.masks import guard_empty_rows
from calicache.export.lowerings.reshapes import views_to_reshapes
from calicache.export.lowerings.small_terms import scale_small_terms
from calicache.export.lowerings.squeeze import drop_empty_squeezes
from calicache.export.lowerings.where import lower_boolean_where
from calicache.graph_passes.common.errors import ExportError, reason_of
from calicache.graph_passes.graph.surgery import device_of, shape_of
from calicache.graph_passes.rewriting.variants import Variant

# What is done to a graph before torch.onnx sees it, in this order.
LOWERINGS = (
    views_to_reshapes,
    fold_constants,
    guard_empty_rows,
    fuse_attention,
    lower_einsum,
    drop_empty_squeezes,
    lower_complex,
    scale_small_terms,
)
BFLOAT16_OPSET = 23


def export_variant(variant: Variant) -> ir.Model:
    """One variant, translated by torch.onnx.

    Raises:
        ExportError: with the exporter's reason.
    """
    return export_graph(variant.module, f"variant {variant.mode.name}")


def export_graph(module: fx.GraphModule, name: str) -> ir.Model:
    """A graph whose placeholders describe their values, translated by torch.onnx.

    Raises:
        ExportError: with the exporter's reason.
    """
    lowered = _lowered(module)
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    examples = tuple(_example(node, module) for node in placeholders)
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                lowered.eval(),
                examples,
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=_opset(placeholders, module),
            )
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps the op's own error
            cause = cause.__cause__
        raise ExportError(
            name,
            expected="a graph that torch.onnx translates",
            got=reason_of(cause),
            fix="See the chained error; an op of the model has no ONNX form.",
        ) from error
    assert program is not None
    return lower_boolean_where(program.model)


def _lowered(module: fx.GraphModule) -> fx.GraphModule:
    """In forms that the exporter takes and ONNX Runtime runs well."""
    for lower in LOWERINGS:
        module = lower(module)
    return module


def _opset(placeholders: Sequence[fx.Node], module: fx.GraphModule) -> int | None:
    """None is torch's own choice, in which Conv and others do not take bfloat16 yet."""
    dtypes = {node.meta["val"].dtype for node in placeholders}
    dtypes |= {value.dtype for value in (*module.parameters(), *module.buffers())}
    return BFLOAT16_OPSET if torch.bfloat16 in dtypes else None


def _example(node: fx.Node, module: fx.GraphModule) -> Tensor:
    return torch.zeros(shape_of(node), dtype=node.meta["val"].dtype, device=device_of(module))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
