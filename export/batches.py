"""An optimised model at other batch sizes, to see what of a graph is the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from calicache.export.artifact.manifest import OpenSize
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import CalicacheError, ExportError
from calicache.graph_passes.graph.operations import DATA_MOVEMENT
from calicache.graph_passes.graph.surgery import module_path
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.recording.step_calls import batch_size
from calicache.graph_passes.sampler.tables import SamplerTables

SIZES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # of a batch that is not in use otherwise


def two_sizes(optimized: OptimizedModel, unit: int) -> tuple[int, int]:
    """Two batch sizes that no other size of the model's values is equal to.

    Args:
        optimized: for calls of a recorded form.
        unit: rows of one sample.

    Raises:
        ExportError: the model reads off its inputs what its graph is made for.
    """
    captured = optimized.compiled.captured
    if optimized.compiled.analysis.fixed:
        name = next(iter(optimized.compiled.analysis.fixed))
        raise refused(f"the values of {name} decide sizes or branches")
    values = [node.meta.get("val") for node in captured.graph.nodes]
    used = {size for value in values if isinstance(value, Tensor) for size in value.shape}
    used.add(len(optimized.plan.schedule))
    free = [size for size in SIZES if size not in used and size * unit not in used]
    return free[0], free[1]


def check_operations(optimized: OptimizedModel, others: Sequence[OptimizedModel]) -> None:
    """Refuse a model that does something else at another batch, such as at a batch of one.

    Args:
        optimized: for calls of a recorded form.
        others: for other batches.

    Raises:
        ExportError: it does; with the first operation that differs.
    """
    known = _operations(optimized)
    for other in others:
        for one, two in zip_longest(known, _operations(other), fillvalue="nothing"):
            if one != two:
                raise refused(f"{one} at one batch size, and {two} at another")


def _operations(optimized: OptimizedModel) -> list[str]:
    """What a model computes, in words; moves of data depend on how it lies in memory."""
    return [
        f"{node.target} ({module_path(node) or 'the model itself'})"
        for node in optimized.compiled.captured.graph.nodes
        if node.op == "call_function" and node.target not in DATA_MOVEMENT
    ]


def at_rows(optimized: OptimizedModel, rows: int) -> OptimizedModel:
    """The optimised model for calls of another batch.

    Args:
        optimized: for calls of a recorded form.
        rows: first dimension of the latent, and of all that has the latent's now.

    Raises:
        ExportError: the model cannot be captured for it.
    """
    binding = optimized.plan.binding
    before = batch_size(binding.signature, binding.dependence)
    tensors = [
        torch.zeros(_at(spec.shape, before, rows), dtype=spec.torch_dtype)
        for spec in binding.signature.tensors
    ]
    arguments = binding.signature.unflatten(tensors)
    try:
        return optimized.for_call(
            **{name: _repeated(value, before, rows) for name, value in arguments.items()}
        )
    except CalicacheError as error:
        raise refused(f"at {rows} rows: {error.got}") from error


def tables_at(tables: SamplerTables, specs: Sequence[TensorSpec]) -> SamplerTables:
    """The tables of a sampler for calls of other sizes.

    Args:
        tables: for the recorded ones.
        specs: of all tensors of a step's calls in one.

    Raises:
        ExportError: an input has other sizes and is not the same along them.
    """
    shapes = {spec.name: spec.shape for spec in specs}
    inputs = {}
    for name, table in tables.inputs.items():
        inputs[name] = table if table.shape[1:] == shapes[name] else _spread(table, shapes[name])
        if inputs[name].shape[1:] != shapes[name]:
            raise ExportError(
                "sampler",
                expected=f"{name} of the sizes {list(shapes[name])}, which the graphs are for",
                got=f"{list(table.shape[1:])}, not the same along what differs",
                fix="Record and plan at these sizes, or export the recorded ones.",
            )
    return replace(tables, inputs=inputs)


def _spread(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A table (T, ...) with (T, *shape), where it is the same along what differs; else as it is."""
    one = table
    for place, (now, then) in enumerate(zip(table.shape[1:], shape, strict=False), start=1):
        if now != then:
            one = one.narrow(place, 0, 1)
    if table.ndim != 1 + len(shape) or not torch.equal(table, one.expand_as(table)):
        return table
    return one.expand(len(table), *shape).contiguous()


def open_sizes(
    specs: tuple[TensorSpec, ...], others: tuple[TensorSpec, ...], batch: int
) -> dict[str, tuple[OpenSize, ...]]:
    """Which dimensions of which tensors are how many batches.

    Args:
        specs: for one batch size.
        others: the same tensors for another.
        batch: the first one.
    """
    found = {}
    for one, two in zip(specs, others, strict=True):
        pairs = enumerate(zip(one.shape, two.shape, strict=True))
        sizes = tuple(OpenSize(place, a // batch) for place, (a, b) in pairs if a != b)
        if sizes:
            found[one.name] = sizes
    return found


def refused(got: str) -> ExportError:
    """A batch that cannot be left open."""
    return ExportError(
        "dynamic batch",
        expected="a model that does the same for every batch",
        got=got,
        fix="Leave dynamic out, and export an artifact for every size that you need "
        "(optimized.for_call).",
    )


def _at(shape: tuple[int, ...], before: int, rows: int) -> tuple[int, ...]:
    return (rows, *shape[1:]) if shape[:1] == (before,) else shape


def _repeated(value: Any, before: int, rows: int) -> Any:
    """A list with one plain value for every row, for other rows."""
    plain = isinstance(value, list | tuple) and len(value) == before
    if not plain or any(isinstance(item, Tensor) or item != value[0] for item in value):
        return value
    return type(value)([value[0]] * rows)
