"""An optimised model at other sizes, to see what of a graph grows with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from calicache.export.artifact.open_sizes import Axis, OpenSize, Sizes, fitted_formula
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import CalicacheError, ExportError, reason_of
from calicache.graph_passes.graph.operations import DATA_MOVEMENT
from calicache.graph_passes.graph.surgery import module_path
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.recording.step_calls import batch_size
from calicache.graph_passes.sampler.tables import SamplerTables

# Of what is open, where they are not in use otherwise.
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)


@dataclass(frozen=True, slots=True)
class OpenAxes:
    """Which dimensions of a model's inputs are to be left open.

    Attributes:
        axes: what is open.
        recorded: rows of the latent for the batch, and tokens of the text and of the latent.
        samples: rows of one sample, which are the guidance parts of a batched call.
        places: by input, its dimensions that are open, and what each is.
    """

    axes: tuple[Axis, ...]
    recorded: Sizes
    samples: int
    places: Mapping[str, Mapping[int, Axis]]


def open_axes(optimized: OptimizedModel, axes: Sequence[Axis], samples: int) -> OpenAxes:
    """Where the sizes that are to be open are in the model's inputs.

    Args:
        optimized: for calls of a recorded form.
        axes: what is to be open.
        samples: rows of one sample.

    Raises:
        ExportError: an axis is nowhere, or two of them are equally long.
    """
    binding = optimized.plan.binding
    specs, dependence = binding.signature.tensors, binding.dependence
    rows = batch_size(binding.signature, dependence)
    latents = {spec.name for spec in specs if dependence[spec.name] is Dependence.LATENT}
    recorded = {Axis.BATCH: rows}
    for axis in axes:
        if axis is not Axis.BATCH:
            of_latent = axis is Axis.TOKENS
            sequences = [s for s in specs if (s.name in latents) is of_latent]
            recorded[axis] = _length(axis, [s.shape for s in sequences], rows)
    if len(set(recorded.values())) < len(recorded):
        raise refused(
            f"sizes that are equal: {', '.join(f'{a} {n}' for a, n in recorded.items())}",
            "Record with a batch, a prompt and a latent of different lengths.",
        )
    places = {spec.name: _places(spec, spec.name in latents, axes, recorded) for spec in specs}
    return OpenAxes(tuple(axes), recorded, samples, places)


def _length(axis: Axis, shapes: Sequence[tuple[int, ...]], rows: int) -> int:
    """How many tokens the sequences (B, tokens, C) have.

    Raises:
        ExportError: there are none, or of several lengths.
    """
    lengths = {shape[1] for shape in shapes if len(shape) == 3 and shape[0] == rows}
    if len(lengths) != 1:
        wanted = "latent" if axis is Axis.TOKENS else "text"
        found = f"lengths {sorted(lengths)}" if lengths else "none"
        raise refused(f"{axis}: one {wanted} (B, tokens, channels) is needed, there are {found}")
    return lengths.pop()


def _places(
    spec: TensorSpec, is_latent: bool, axes: Sequence[Axis], recorded: Sizes
) -> dict[int, Axis]:
    """The batch in front; a length right behind it, or in front where there is no batch."""
    in_front = spec.shape[:1] == (recorded[Axis.BATCH],)
    places = {0: Axis.BATCH} if in_front and Axis.BATCH in axes else {}
    is_mask = not spec.torch_dtype.is_floating_point or "mask" in spec.name
    if in_front and len(spec.shape) == 2 and not is_mask:
        return places  # (B, channels)
    place = int(in_front)
    for axis in axes:
        length = None if axis is Axis.PROMPT and is_latent else recorded[axis]
        if axis is not Axis.BATCH and spec.shape[place : place + 1] == (length,):
            places[place] = axis
    return places


def points_of(optimized: OptimizedModel, axes: OpenAxes) -> tuple[Sizes, ...]:
    """Sizes to export at, as `fitted_formula` wants them, equal to no other size of the model.

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
    free = iter(n for n in PRIMES if n not in used and n * axes.samples not in used)
    first = {axis: next(free) for axis in axes.axes}
    points = [first, *({**first, axis: next(free)} for axis in axes.axes)]
    if set(axes.axes) != {Axis.BATCH}:  # a batch is a factor: two points tell it from a chance
        points.append({axis: next(free) for axis in axes.axes})
    return tuple(points)


def check_operations(optimized: OptimizedModel, others: Sequence[OptimizedModel]) -> None:
    """Refuse a model that does something else at another size, such as at a batch of one.

    Args:
        optimized: for calls of a recorded form.
        others: for other sizes.

    Raises:
        ExportError: it does; with the first operation that differs.
    """
    known = _operations(optimized)
    for other in others:
        for one, two in zip_longest(known, _operations(other), fillvalue="nothing"):
            if one != two:
                raise refused(f"{one} at one size, and {two} at another")


def _operations(optimized: OptimizedModel) -> list[str]:
    """What a model computes, in words; moves of data depend on how it lies in memory."""
    return [
        f"{node.target} ({module_path(node) or 'the model itself'})"
        for node in optimized.compiled.captured.graph.nodes
        if node.op == "call_function" and node.target not in DATA_MOVEMENT
    ]


def at_sizes(optimized: OptimizedModel, axes: OpenAxes, sizes: Sizes) -> OptimizedModel:
    """The optimised model for calls of other sizes; those that are not named stay as recorded.

    Raises:
        ExportError: the model cannot be captured for them.
    """
    signature, rows = optimized.plan.binding.signature, axes.recorded[Axis.BATCH]
    new_rows = sizes[Axis.BATCH] * axes.samples if Axis.BATCH in sizes else rows
    lengths = {**sizes, Axis.BATCH: new_rows}
    tensors = []
    for spec in signature.tensors:
        shape = list(spec.shape)
        for place, axis in axes.places[spec.name].items():
            shape[place] = lengths.get(axis, shape[place])
        tensors.append(torch.zeros(shape, dtype=spec.torch_dtype))
    arguments = signature.unflatten(tensors)
    try:
        return optimized.for_call(
            **{name: _repeated(value, rows, new_rows) for name, value in arguments.items()}
        )
    except Exception as error:  # the model itself may refuse the size
        reason = error.got if isinstance(error, CalicacheError) else reason_of(error)
        raise refused(f"{at_words(sizes)}: {reason}") from error


def at_words(sizes: Sizes) -> str:
    """At which sizes, such as `at batch 2, prompt 7`."""
    return "at " + ", ".join(f"{axis} {size}" for axis, size in sizes.items())


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
    forms: Sequence[Sequence[TensorSpec]], points: Sequence[Sizes]
) -> dict[str, tuple[OpenSize, ...]]:
    """Which dimensions of which tensors are open.

    Args:
        forms: of the same tensors at every point.
        points: the open sizes of each.

    Raises:
        ExportError: a size is not given by the open ones.
    """
    opened = {}
    for specs in zip(*forms, strict=True):
        name, sizes = specs[0].name, []
        for place, lengths in enumerate(zip(*(spec.shape for spec in specs), strict=True)):
            formula = fitted_formula(lengths, points)
            if formula is None:
                raise refused(f"{name} with the sizes {list(lengths)}")
            if formula.axes:
                sizes.append(OpenSize(place, formula))
        if sizes:
            opened[name] = tuple(sizes)
    return opened


def refused(got: str, fix: str = "") -> ExportError:
    """A size that cannot be left open."""
    return ExportError(
        "dynamic",
        expected="a model that does the same at all sizes",
        got=got,
        fix=fix
        or "Leave it out of dynamic, and export an artifact for every size that you need "
        "(optimized.for_call).",
    )


def _repeated(value: Any, before: int, rows: int) -> Any:
    """A list with one plain value for every row, for other rows."""
    plain = isinstance(value, list | tuple) and len(value) == before
    if not plain or any(isinstance(item, Tensor) or item != value[0] for item in value):
        return value
    return type(value)([value[0]] * rows)
