"""The statistics of a plan: checked against its targets, and as tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import Granularity, Weighting
from calicache.graph_passes.sites.targets import CalibrationTarget


def check_statistics(
    statistics: Mapping[str, Statistics],
    weighting: Weighting,
    targets: Sequence[CalibrationTarget],
) -> None:
    """Refuse statistics that do not fit the targets or are not finite.

    Raises:
        PlanError: a target has none, of another width, or with NaN or Inf.
    """
    for target in targets:
        expected = statistics_shapes(weighting, target)
        if not target.rank or not expected:
            continue
        tensors = statistics_tensors(statistics.get(target.name))
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        finite = all(bool(torch.isfinite(value).all()) for value in tensors.values())
        if shapes != expected or not finite:
            raise PlanError(
                f"statistics of {target.name}",
                expected=f"finite values of shapes {expected}",
                got="NaN or Inf"
                if shapes == expected
                else f"shapes {shapes}"
                if shapes
                else "none",
                fix="Make the plan again from the recording, with the steps it will run.",
            )


def statistics_shapes(
    weighting: Weighting, target: CalibrationTarget
) -> dict[str, tuple[int, ...]]:
    """Shapes of a calibration target's statistics, by name of the part.

    Increments of a layer are observed on its smaller side, those of a whole branch on both.
    """
    inputs, outputs = target.in_features, sum(target.out_features)
    if target.granularity is Granularity.BRANCH:
        return {"input": (inputs, inputs), "cross": (inputs, outputs), "energy": ()}
    if weighting is Weighting.NONE:
        return {}
    if weighting is not Weighting.COVARIANCE:
        return {"input": (inputs,), "output": (outputs,)}
    return {"output": (outputs,) * 2} if outputs < inputs else {"input": (inputs,) * 2}


def statistics_tensors(statistics: Statistics | None) -> dict[str, Tensor]:
    """The tensors that are written, by name."""
    if statistics is None:
        return {}
    if isinstance(statistics, SecondMoments):
        return statistics.tensors()
    return {"input": statistics.input, "output": statistics.output}


def named_tensors(statistics: Mapping[str, Statistics]) -> dict[str, Tensor]:
    """All tensors by name of the target and of the part, `blocks.0.attn.q.output`."""
    return {
        f"{name}.{part}": value
        for name, parts in statistics.items()
        for part, value in statistics_tensors(parts).items()
    }


def named_statistics(tensors: Mapping[str, Tensor]) -> dict[str, Statistics]:
    """What `named_tensors` took apart, by name of the target."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        owner, _, part = name.rpartition(".")
        parts.setdefault(owner, {})[part] = value
    return {name: statistics_of(tensors) for name, tensors in parts.items()}


def statistics_of(tensors: Mapping[str, Tensor]) -> Statistics:
    """What `statistics_tensors` took apart."""
    if all(value.ndim == 1 for value in tensors.values()):
        return ChannelStatistics(tensors["input"], tensors["output"])
    return SecondMoments(**tensors)


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """Second moments of the increments dx = x - x* and dy = y - y*, averaged over tokens.

    Attributes:
        input: float32 E[dx dx^T] (in, in), or None.
        output: float32 E[dy dy^T] (out, out), where `out` is the smaller side, or None.
        cross: float32 E[dx dy^T] (in, out), for a residual branch alone, or None.
        energy: float32 E|dy|^2 (), for a residual branch alone, or None.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    cross: Tensor | None = None
    energy: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The moments that are there, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Mean magnitude per channel, each sample min-max normalised over its channels.

    Attributes:
        input: float32 (in,), of x or of its increments.
        output: float32 (out,), of y or of its increments.
    """

    input: Tensor
    output: Tensor


Statistics = ChannelStatistics | SecondMoments
