"""Recorded models looked at once, and what their CALIBRATE steps would correct."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from support.models import modes, shake
from torch import Tensor, nn

from calicache.graph_passes import Recording, StepMode, record
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import Statistics
from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.sites.analysis import Analysis, analyse
from calicache.graph_passes.sites.targets import CalibrationTarget, assign

PAPER = modes("RCCRCC")  # as the paper's own, with an interval of 3


_known: WeakKeyDictionary[nn.Module, list[tuple[object, Analysis]]] = WeakKeyDictionary()


def analyse_once(
    model: nn.Module,
    binding: Binding,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Analysis:
    """`analyse`, done once for a model in the process of a test: it is most of what a plan takes.

    A model that was changed or moved meanwhile is another one. What else a recording tells, such
    as its timesteps, no graph depends on.
    """
    if any(part.training for part in model.modules()):
        return analyse(model, binding, include, exclude)
    place = {(value.device, value.dtype) for value in model.parameters()}
    own = (id(vars(model).get("forward")), place, tuple(include), tuple(exclude))
    form = (binding.signature, binding.dependence, binding.reads, binding.run_values)
    key = (*own, *form, binding.weights_hash)
    known = _known.setdefault(model, [])
    for other, analysis in known:
        if other == key:
            return replace(analysis, binding=binding)
    known.append((key, analyse(model, binding, include, exclude)))
    return known[-1][1]


def analysis_of(model: nn.Module, recording: Recording, exclude: Collection[str] = ()) -> Analysis:
    """What a model is for the calls of a recording."""
    return analyse_once(model, bind(model, recording), exclude=tuple(exclude))


def noise_analysis(model: nn.Module) -> Analysis:
    """What a model with random weights is for two calls with noise, (2, 5, 8)."""
    with record(shake(model)) as recording:
        for _ in range(2):
            model(torch.randn(2, 5, 8))
    return analysis_of(model, recording)


def targets_of(analysis: Analysis, rank: int, **options: Any) -> tuple[CalibrationTarget, ...]:
    """Calibration targets in graph order, whatever was refused beside them."""
    return tuple(assign(analysis.captured, analysis.sites, rank=rank, **options)[0])


def seen_by(
    analysis: Analysis,
    recording: Recording,
    weighting: Weighting,
    schedule: tuple[StepMode, ...] = PAPER,
    meter: Meter | None = None,
) -> dict[str, Statistics]:
    """Statistics of every linear layer on its own, against stale anchors."""
    targets = targets_of(analysis, 1)
    return observe(analysis.captured, targets, recording, weighting, schedule, 0, meter)


def part(recording: Recording, *indices: int) -> Recording:
    """A recording of some of the calls."""
    return Recording([recording.calls[k] for k in indices], recording.signature)


def replaced(recording: Recording, step: int, name: str, value: Tensor) -> Recording:
    """The recording with another value of an argument in one call."""
    calls = list(recording.calls)
    calls[step] = {**calls[step], name: value}
    return Recording(calls, recording.signature)
