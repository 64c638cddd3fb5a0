"""From fx graphs to ONNX graphs: lowerings, then a template for every operation."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import chain
from typing import TypeVar

import onnx_ir as ir
import torch
from torch import fx

from calicache.export.artifact.manifest import Attention
from calicache.export.lowerings.attention import ATTENTIONS, fuse_attention
from calicache.export.lowerings.complex import lower_complex
from calicache.export.lowerings.constants import fold_constants
from calicache.export.lowerings.einsum import lower_einsum
from calicache.export.lowerings.masks import guard_empty_rows
from calicache.export.lowerings.moves import cancel_moves
from calicache.export.lowerings.products import products_to_linears
from calicache.export.lowerings.reshapes import views_to_reshapes
from calicache.export.lowerings.rewriting import lower_graph
from calicache.export.lowerings.small_terms import scale_small_terms
from calicache.export.lowerings.squeeze import drop_empty_squeezes
from calicache.export.translation.doubles import widen_numbers
from calicache.export.translation.forms import forms_of
from calicache.export.translation.join import join_templates
from calicache.export.translation.templates import Dialect, Templates
from calicache.graph_passes.graph.surgery import device_of

# What is done to a graph before it is translated, in this order.
LOWERINGS = (
    views_to_reshapes,
    fold_constants,
    guard_empty_rows,
    fuse_attention,
    products_to_linears,
    cancel_moves,
    lower_einsum,
    drop_empty_squeezes,
    lower_complex,
    scale_small_terms,
    widen_numbers,
)
BFLOAT16_OPSET = 23
# Of this process: a template is decided by its form, so a second layout translates nothing again.
TEMPLATES = Templates()
Name = TypeVar("Name", bound=Hashable)


def translate(
    modules: Mapping[Name, fx.GraphModule], attention: Attention = Attention.FUSED
) -> dict[Name, ir.Model]:
    """Graphs in ONNX by the same names; what they have in common is translated once.

    Args:
        modules: by name, on one device; their nodes describe their values.
        attention: what it is written with.

    Raises:
        ExportError: an operation has no ONNX form; with the exporter's reason.
    """
    # Nodes describe their values by fake tensors, which threads cannot share.
    lowerings = [ATTENTIONS[attention] if one is fuse_attention else one for one in LOWERINGS]
    with TEMPLATES.lock:
        lowered = {name: lower_graph(module, *lowerings) for name, module in modules.items()}
    opset = BFLOAT16_OPSET if any(_holds_bfloat16(module) for module in lowered.values()) else None
    dialect = Dialect(opset, device_of(next(iter(modules.values()))), attention)
    forms = {name: forms_of(module) for name, module in lowered.items()}
    templates = TEMPLATES.of(chain.from_iterable(f.values() for f in forms.values()), dialect)
    return {
        name: join_templates(module, forms[name], templates) for name, module in lowered.items()
    }


def _holds_bfloat16(module: fx.GraphModule) -> bool:
    """Whether torch.onnx's own choice of opset will not do: Conv has no bfloat16 there."""
    inputs = (node.meta["val"] for node in module.graph.nodes if node.op == "placeholder")
    values = (*inputs, *module.parameters(), *module.buffers())
    return any(value.dtype is torch.bfloat16 for value in values)
