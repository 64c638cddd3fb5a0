"""Recorded models looked at once, and what their CALIBRATE steps would correct."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from support.models import shake
from torch import nn

from calicache.graph_passes import Recording, record
from calicache.graph_passes.recording.binding import bind
from calicache.graph_passes.sites.analysis import Analysis, analyse
from calicache.graph_passes.sites.targets import CalibrationTarget, assign


def analysis_of(model: nn.Module, recording: Recording, exclude: Collection[str] = ()) -> Analysis:
    """What a model is for the calls of a recording."""
    return analyse(model, bind(model, recording), exclude=tuple(exclude))


def noise_analysis(model: nn.Module) -> Analysis:
    """What a model with random weights is for two calls with noise, (2, 5, 8)."""
    with record(shake(model)) as recording:
        for _ in range(2):
            model(torch.randn(2, 5, 8))
    return analysis_of(model, recording)


def targets_of(analysis: Analysis, rank: int, **options: Any) -> tuple[CalibrationTarget, ...]:
    """Calibration targets in graph order, whatever was refused beside them."""
    return tuple(assign(analysis.captured, analysis.sites, rank=rank, **options)[0])
