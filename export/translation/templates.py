"""Templates: every form of operation as a small ONNX graph, made by torch.onnx.

torch.onnx spends 7 ms on an operation, whichever it is. All new forms of a model go through it
together, side by side in one graph; what becomes of each is cut out and copied at will.
"""

from __future__ import annotations

import logging
import operator
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import onnx_ir as ir
import torch
from onnx_ir import convenience
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, fx

from calicache.export.artifact.manifest import Attention
from calicache.export.translation.forms import Form, value_of
from calicache.export.translation.quantised import OWN_TEMPLATES
from calicache.export.translation.scatter import widen_scattered_sums
from calicache.export.translation.where import lower_boolean_where
from calicache.graph_passes.common.errors import ExportError, reason_of
from calicache.graph_passes.graph.surgery import module_path, read_attribute

MOST = 4096  # templates that are held; one more, and all are let go


@dataclass(frozen=True, slots=True)
class Dialect:
    """What decides a template beside its form.

    Attributes:
        opset: of the ONNX operators; None for torch.onnx's own choice.
        device: where the operations' own numbers are.
        attention: whether they may be operators of ONNX Runtime's own.
    """

    opset: int | None
    device: torch.device
    attention: Attention = Attention.FUSED


@dataclass(slots=True)
class Templates:
    """Templates made before, in memory alone.

    Attributes:
        held: by dialect and text of the form.
        lock: for threads that export at the same time.
    """

    held: dict[tuple[Dialect, str], ir.Model] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def of(self, forms: Iterable[Form], dialect: Dialect) -> dict[str, ir.Model]:
        """The template of every form by its text; those that are new are translated together.

        Raises:
            ExportError: torch.onnx does not translate one; with its reason.
        """
        by_text = {form.text: form for form in forms}
        with self.lock:
            templates = {
                text: self.held[dialect, text] for text in by_text if (dialect, text) in self.held
            }
            fresh = [form for text, form in by_text.items() if text not in templates]
            translated = _translated(fresh, dialect) if fresh else {}
            if len(self.held) + len(translated) > MOST:
                self.held.clear()
            self.held |= {
                (dialect, form.text): translated[form.text]
                for form in fresh
                if not form.graphs  # the text does not say what these do
            }
        return templates | translated


def _translated(forms: Sequence[Form], dialect: Dialect) -> dict[str, ir.Model]:
    known = OWN_TEMPLATES[dialect.attention]
    own = [form for form in forms if form.node.target in known]
    others = [form for form in forms if form.node.target not in known]
    templates = {form.text: known[form.node.target](form) for form in own}
    try:
        return templates | (translate_forms(others, dialect) if others else {})
    except Exception:
        for form in others:  # which one is it?
            _try(form, dialect)
        raise


def _try(form: Form, dialect: Dialect) -> None:
    try:
        translate_forms([form], dialect)
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter wraps the op's own error
            cause = cause.__cause__
        raise ExportError(
            f"{form.node.name} ({module_path(form.node) or form.node.target})",
            expected="an operation that torch.onnx translates",
            got=reason_of(cause),
            fix="See the chained error; the operation has no ONNX form.",
        ) from error


def translate_forms(forms: Sequence[Form], dialect: Dialect) -> dict[str, ir.Model]:
    """Forms in ONNX by their texts: inputs are their tensors in order, outputs their results.

    Args:
        forms: each once.
        dialect: of all.

    Raises:
        Exception: whatever torch.onnx raises for an operation that it does not translate.
    """
    module, examples = _side_by_side(forms, dialect.device)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            examples,
            dynamo=True,
            optimize=True,
            verbose=False,
            opset_version=dialect.opset,
        )
    assert program is not None
    model = widen_scattered_sums(lower_boolean_where(program.model))
    ClearMetadataAndDocStringPass()(model)
    inputs, outputs = iter(model.graph.inputs), iter(model.graph.outputs)
    return {
        form.text: ir.Model(
            convenience.extract(
                model.graph,
                [*islice(inputs, len(form.tensors))],
                [*islice(outputs, len(form.items) or 1)],
            ),
            ir_version=model.ir_version,
        )
        for form in forms
    }


def _side_by_side(
    forms: Sequence[Form], device: torch.device
) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """One graph of all forms, and stand-ins for its inputs."""
    graph = fx.Graph()
    root: dict[str, fx.GraphModule] = {}
    examples: list[Tensor] = []
    copies: dict[tuple[Form, fx.Node], fx.Node] = {}
    for form in forms:
        for source in form.tensors:
            value = value_of(source, form.module)
            copies[form, source] = graph.placeholder(f"value_{len(examples)}")
            # Not zeros: memory that nobody touches costs nothing.
            examples.append(torch.empty(value.shape, dtype=value.dtype, device=device))
    results: list[fx.Node] = []
    for form in forms:
        for source in form.graphs:
            target = f"graph_{len(root)}"
            inner = read_attribute(form.module, str(source.target))
            assert isinstance(inner, fx.GraphModule)
            root[target] = inner
            copies[form, source] = graph.get_attr(target)
        sources = {source: copies[form, source] for source in form.sources}
        call = graph.node_copy(form.node, sources.__getitem__)
        items = [graph.call_function(operator.getitem, (call, item)) for item in form.items]
        results += items or [call]
    graph.output(tuple(results))
    return fx.GraphModule(root, graph, class_name="Forms"), tuple(examples)


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
