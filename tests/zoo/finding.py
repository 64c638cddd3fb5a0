"""What becomes of one model of the zoo: sites, agreement at full rank, ONNX Runtime."""

from __future__ import annotations

import glob
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calicache.export import Session, export_onnx, read_sampler
from calicache.export.artifact.open_sizes import Axis
from calicache.graph_passes import (
    CalicacheError,
    Dependence,
    OptimizedModel,
    Plan,
    Recording,
    SiteMode,
    SiteRule,
    Sites,
    optimize,
    record,
)
from calicache.graph_passes.common.errors import reason_of
from calicache.graph_passes.graph.operations import LINEAR
from zoo.drive import DenoisingRun, first_tensor, make_model, run_sampler
from zoo.entry import ZooEntry

# W and its decomposition at full rank differ by float32 rounding, 1e-7 to 1e-6, and the layers
# of a few blocks multiply that over the run. A missed site leaves 1e-2 and more.
FULL_RANK_BOUND = 1e-4
# ONNX Runtime sums in another order and has its own exp, erf and softmax: 1e-6 an operation, a
# little more than torch against itself.
ONNX_BOUND = 1e-3
REFUSED, NOTHING = "refused", "n/a"  # how a reason begins


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison.

    Attributes:
        error: relative L2 error of the worst step; None where there was nothing to compare.
        bound: largest error that counts as equal.
        reason: why there is none, or why it failed.
    """

    error: float | None = None
    bound: float = FULL_RANK_BOUND
    reason: str = "not tried"

    @property
    def passed(self) -> bool:
        """Whether the two agree."""
        return self.error is not None and self.error <= self.bound

    @property
    def explained(self) -> bool:
        """Whether the two agree, calicache refused in words, or there was nothing to compare."""
        return self.passed or self.reason.startswith((REFUSED, NOTHING))


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one entry.

    Attributes:
        name: of the entry.
        sites: linear layers that CALIBRATE steps can correct.
        linears: linear layers that depend on the latent; `coverage` is the sites' share of
            their multiply-accumulates.
        rejections: why the others are left alone, with the number of layers.
        full_rank: the optimised model against the original, CALIBRATE steps at full rank.
        stale: the error of the same schedule at rank 0: what full rank has to mend.
        onnx: ONNX Runtime against the optimised model, layout `step`, all steps.
        sampler: the same in the layout `sampler`: how far the run moves the latent.
        seconds: that all of it took.
        closed: by size, why a file cannot leave it open, empty where it can; nothing was tried
            where there is no size.
        others: by size, how calls of another one than the recorded did; see `zoo.other_sizes`.
    """

    name: str
    sites: int | None = None
    linears: int | None = None
    coverage: float | None = None
    rejections: dict[str, int] = field(default_factory=dict)
    full_rank: Check = Check()
    stale: float | None = None
    onnx: Check = Check(bound=ONNX_BOUND)
    sampler: Check = Check(bound=ONNX_BOUND)
    seconds: float = 0.0
    closed: dict[str, str] = field(default_factory=dict)
    others: dict[str, Check] = field(default_factory=dict)


def failed(name: str, reason: str, seconds: float = 0.0) -> Finding:
    """The finding of a model with which nothing could be done."""
    return Finding(name, full_rank=Check(reason=reason), seconds=seconds)


def take(entry: ZooEntry, *, onnx: bool = True, sampler: bool = True) -> Finding:
    """Record, plan, optimise, compare and export one entry.

    Args:
        entry: of the zoo.
        onnx: try the layout `step`, which takes longer than all before it.
        sampler: try the layout `sampler`, which takes as long.
    """
    start = time.perf_counter()
    finding = Finding(entry.name)
    try:
        model = make_model(entry)
        with record(model) as recording:
            run = run_sampler(model, entry, linear=True)
        recording.finish(run.latents)
        plan = Plan.from_trajectory(
            model, recording, schedule=3, rank=0, order=0, weighting="none", correct=False
        )
        stale = optimize(model, plan)
        error = _error_of_run(stale, entry, run)
        finding = replace(finding, **_coverage(stale), stale=_finite(error))
        fast = optimize(model, full_rank(plan, stale.compiled.analysis.sites))
        error = _error_of_run(fast, entry, run)
        finding = replace(finding, full_rank=check_error(error, FULL_RANK_BOUND, "the original"))
    except Exception as error:
        finding = replace(finding, full_rank=Check(reason=one_line(error)))
    else:
        if onnx:
            finding = replace(finding, onnx=_guarded(lambda: _step_layout_error(fast, recording)))
        if sampler:
            finding = replace(finding, sampler=_check_sampler(fast, entry, recording))
    return replace(finding, seconds=time.perf_counter() - start)


def refused_sizes(entry: ZooEntry) -> dict[str, str]:
    """Why each size cannot be left open in the layout `step`; an empty text where it can."""
    try:
        model = make_model(entry)
        with record(model) as recording:
            run_sampler(model, entry, linear=True)
        plan = Plan.from_trajectory(
            model, recording, schedule=3, rank=2, order=0, weighting="none", correct=False
        )
        fast = optimize(model, plan)
    except Exception as error:
        return dict.fromkeys(Axis, one_line(error))
    return {axis: _refusal(fast, axis) for axis in Axis}


def _refusal(fast: OptimizedModel, axis: Axis) -> str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            export_onnx(fast, Path(folder) / "d", dynamic=(axis,), check=False)
        except CalicacheError as error:
            return one_line(error)
    return ""


def full_rank(plan: Plan, sites: Sites) -> Plan:
    """The plan with every site at the rank of its layer."""
    rules = tuple(
        SiteRule(
            pattern=glob.escape(site.name),
            mode=SiteMode.CALIBRATE,
            rank=min(site.in_features, site.out_features),
        )
        for site in sites.linears
    )
    return replace(plan, recipe=replace(plan.recipe, rules=rules))


def one_line(error: Exception) -> str:
    """The stage that refuses and what it met, or the error's own first line."""
    if isinstance(error, CalicacheError):
        text = f"{error.stage}: {error.where}: expected {error.expected}, got {error.got}"
    else:
        text = f"not a CalicacheError: {reason_of(error)}"
    folder = rf"{re.escape(tempfile.gettempdir())}/\w+/"
    return re.sub(folder, "", " ".join(text.split()))


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error; infinite where a value is not finite."""
    error = float((got - expected).norm() / expected.norm().clamp(min=1e-12))
    return error if math.isfinite(error) else math.inf


def _coverage(optimized: OptimizedModel) -> dict[str, Any]:
    """Sites and their share of the linear layers on the latent stream."""
    analysis = optimized.compiled.analysis
    sites, classes = analysis.sites, analysis.classes
    macs = {
        node.name: analysis.macs[node.name]
        for node in analysis.captured.graph.nodes
        if node.target is LINEAR and classes[node.name] is Dependence.LATENT
    }
    reasons = {r.node: r.reason for r in sites.rejections if r.node in macs}
    return {
        "sites": len(sites.linears),
        "linears": len(macs),
        "coverage": sum(macs[site.node] for site in sites.linears) / sum(macs.values()),
        "rejections": dict(Counter(reasons.values())),
    }


def _error_of_run(model: nn.Module, entry: ZooEntry, run: DenoisingRun) -> float:
    """Error of a run of its own against the original's."""
    return worst_error(run_sampler(model, entry, linear=True).outputs, run.outputs)


def _step_layout_error(fast: OptimizedModel, recording: Recording) -> float:
    """Both get the recorded calls, so that errors do not add up."""
    signature = recording.signature
    names = [spec.name for spec in signature.tensors]
    fast.reset()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export_onnx(fast, Path(folder) / "d")
        session = Session(Path(folder) / "d")
        expected, got = [], []
        for step, call in enumerate(recording.calls):
            inputs = signature.unflatten([call[name] for name in names])
            expected.append(first_tensor(fast(**inputs)))
            got.append(torch.from_numpy(session.step(step, **call)))
    return worst_error(got, expected)


def _check_sampler(fast: OptimizedModel, entry: ZooEntry, recording: Recording) -> Check:
    try:
        sampler = read_sampler(fast, recording)
    except CalicacheError as error:
        return Check(None, ONNX_BOUND, f"n/a: {' '.join(error.got.split())}")
    except Exception as error:
        return Check(None, ONNX_BOUND, one_line(error))

    def error_of_run() -> float:
        fast.reset()
        run = run_sampler(fast, entry, linear=True)
        with tempfile.TemporaryDirectory() as folder:
            manifest = export_onnx(fast, Path(folder) / "d", layout="sampler", sampler=sampler)
            assert manifest.sampler is not None
            inputs: dict[str, Any] = {
                spec.name: recording.calls[0][spec.name] for spec in manifest.sampler.inputs
            }
            latents = Session(Path(folder) / "d").sample(run.noise, **inputs)
        # The noise itself is in both and would hide an error of what the run adds.
        return relative(torch.from_numpy(latents) - run.noise, run.latents - run.noise)

    return _guarded(error_of_run)


def _guarded(compare: Callable[[], float]) -> Check:
    try:
        error = compare()
    except Exception as refusal:
        return Check(None, ONNX_BOUND, one_line(refusal))
    return check_error(error, ONNX_BOUND, "PyTorch")


def worst_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative L2 error of the worst step."""
    return max(map(relative, got, expected))


def check_error(error: float, bound: float, other: str) -> Check:
    """A comparison with its verdict.

    Args:
        error: relative L2; infinite where a value is not finite.
        bound: largest that counts as equal.
        other: what was compared with.
    """
    if _finite(error) is None:
        return Check(None, bound, "values that are not finite")
    return Check(error, bound, "" if error <= bound else f"differs from {other} by {error:.1e}")


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None
