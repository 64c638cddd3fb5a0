"""What `speed_up` came to: the promise in a few lines, every part of it a field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.graph_passes.settings.latency import BranchChoice


@dataclass(frozen=True, slots=True)
class PartSummary:
    """One model of the pipeline under its plan.

    Attributes:
        name: such as `transformer`.
        steps: by mode, such as `12 REFRESH + 23 FORECAST`; empty where there is no plan.
        macs: multiply-accumulates of a run against the plain model's.
        seconds: of a run against the plain model's, added up from the probe; None where the model
            could not be probed.
        error: of the final latents on runs that had no part in the search; None where the plan
            was not searched.
        fallback: why the plan has forecasts alone, and an even schedule if it was not searched;
            or why there is none. Empty for a plan of all modes.
        slower: treatments of branches whose steps take as long as plain ones here or longer, as
            shares of a plain step; the search leaves them out.
        rejections: layers and branches that every CALIBRATE step computes in full, with reasons.
        aim: the reference that errors are against, in words; empty for the plain runs.
    """

    name: str
    steps: str
    macs: float
    seconds: float | None
    error: ErrorSummary | None
    fallback: str
    slower: Mapping[BranchChoice, float]
    rejections: tuple[Rejection, ...]
    aim: str = ""

    @property
    def text(self) -> str:
        """One line, or two where something was not possible."""
        lines = [f"  {self.name}: {self.steps or 'no plan'}"]
        if self.steps:
            seconds = "" if self.seconds is None else f", {self.seconds:.2f} of the time by a probe"
            lines[0] += f"; {self.macs:.2f} of the MACs{seconds}"
        if self.error is not None:
            lines.append(f"    error on held-out runs: {self.error.mean:.2g}")
            lines[-1] += f", {self.error.worst:.2g} at worst of {self.error.samples}"
        if self.aim:
            lines.append(f"    {self.aim}")
        if self.fallback:
            words = "not searched" if self.error is None else "forecasts alone"
            lines.append(f"    {words}: {_short(self.fallback)}")
        if self.slower:
            names = (f"{choice} ({share:.2f})" for choice, share in self.slower.items())
            lines.append(f"    no faster than a plain step here: {', '.join(names)}")
        if self.rejections:
            first = self.rejections[0]
            lines.append(f"    left alone: {first.name} ({first.reason})")
            others = len(self.rejections) - 1
            lines[-1] += f" and {others} more" if others else ""
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Promise:
    """What was measured when the plans were made; see `Summary`."""

    parts: tuple[PartSummary, ...]
    plain_seconds: float
    fast_seconds: float
    error: float | None
    runtime: str
    left: str


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Promise):
    """What `speed_up` came to.

    Attributes:
        parts: one for every model.
        plain_seconds, fast_seconds: of the last of the given runs, without decoding, measured
            when the plans were made.
        error: relative L2 error of its final latents, mean over samples; None where they could
            not be compared.
        runtime: what was measured on.
        left: why everything was left as it was; empty where the optimised models are in place.
        searched: whether the plans were searched for now; else they come from the cache folder.
        folder: where they are kept; None where they are not.
        models: the optimised ones by name, plain ones where there is no plan.
    """

    searched: bool
    folder: Path | None
    models: Mapping[str, nn.Module] = field(compare=False)

    @property
    def speedup(self) -> float:
        """How many times as fast a run is; 1 where everything was left as it was."""
        return 1.0 if self.left else self.plain_seconds / self.fast_seconds

    @property
    def model(self) -> nn.Module:
        """The optimised model, or the first of them."""
        return next(iter(self.models.values()))

    def __repr__(self) -> str:
        seconds = f"{self.fast_seconds:.3g} s a run, {self.plain_seconds:.3g} s before"
        lines = [f"{self.speedup:.2f} times as fast ({seconds})"]
        if self.left:
            lines = [f"left as it was: {_short(self.left)}"]
        elif self.error is not None:
            what = "error of the timed run"
            if any(part.aim for part in self.parts):
                what = "distance of the timed run from the plain one"
            lines.append(f"  {what}: {self.error:.2g} of its final latents")
        lines += [part.text for part in self.parts]
        lines.append(f"  measured with {self.runtime}")
        where = f"kept in {self.folder}" if self.folder else "not kept"
        lines.append(
            f"  plans {'searched for now' if self.searched else 'from the cache'}, {where}"
        )
        return "\n".join(lines)


def _short(text: str) -> str:
    """The first sentence of a reason."""
    return text.partition(". ")[0]
