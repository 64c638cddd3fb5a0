"""The rows of `calicache bench`: ways to run one denoising, each made in a process of its own."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calicache.export import Layout, Session
from calicache.graph_passes import Plan, StepMode, optimize
from calicache.graph_passes.common.errors import BenchError
from calicache.tools.bench.models import BenchModel, Denoiser

SEED = 1


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """What is measured.

    Attributes:
        model: as `find_model` takes it.
        interval, steps: of the schedule.
        rank: of the calibration branches; width / 9 where None.
        order: of the anchors.
        repeats: timed runs of every row.
        folder: for plans and artifacts.
        rows: names of the rows to measure; all where empty.
        provider: of ONNX Runtime.
    """

    model: str
    interval: int
    steps: int
    rank: int | None
    order: int
    repeats: int
    folder: Path
    rows: tuple[str, ...] = ()
    provider: str = "CPUExecutionProvider"


@dataclass(frozen=True, slots=True)
class Runner:
    """A loaded row: a denoiser that is called at every step, or a whole run.

    Attributes:
        denoiser: takes and returns what the model does.
        run: from noise to latents; instead of `denoiser`.
        reset: called between runs.
    """

    denoiser: Denoiser | None = None
    run: Callable[[Tensor], Any] | None = None
    reset: Callable[[], None] = lambda: None

    def measure(self, model: BenchModel, steps: int) -> list[float]:
        """Seconds of every step of one run; one number for a whole run."""
        noise, seconds = model.draw(SEED), []
        self.reset()
        with torch.no_grad():
            start = time.perf_counter()
            if self.run is not None:
                self.run(noise)
                return [time.perf_counter() - start]
            assert self.denoiser is not None
            for _ in model.latents(self.denoiser, noise, steps):
                now = time.perf_counter()
                seconds.append(now - start)
                start = now
        return seconds


@dataclass(frozen=True, slots=True)
class BenchTask:
    """What a row is made from: the model, the settings and the folder of its artifact."""

    model: BenchModel
    settings: BenchSettings
    folder: Path


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One way to run.

    Attributes:
        name: for tables.
        artifact: folder name of the artifact that it runs, or whose costs it has.
        make: loads it.
        schedule: modes of its steps where it has others than the artifact.
    """

    name: str
    artifact: str
    make: Callable[[BenchTask], Runner]
    schedule: Callable[[BenchSettings], tuple[StepMode, ...]] | None = None


def bench_rows() -> tuple[BenchRow, ...]:
    """All rows; the first is what the others are measured against."""
    return (
        BenchRow("ONNX Runtime, plain", "plain", _session),
        BenchRow("PyTorch eager, plain", "plain", lambda task: Runner(task.model.build())),
        BenchRow(
            "torch.compile, plain", "plain", lambda task: Runner(torch.compile(task.model.build()))
        ),
        BenchRow("diffusers TaylorSeer hook, order 0 (FORA)", "reuse", _hook(0), _hook_schedule),
        BenchRow("diffusers TaylorSeer hook, order 1", "reuse", _hook(1), _hook_schedule),
        BenchRow("calicache REUSE, PyTorch eager", "reuse", _optimized),
        BenchRow("calicache REUSE, step", "reuse", _session),
        BenchRow("calicache CALIBRATE, PyTorch eager", "step", _optimized),
        BenchRow("calicache CALIBRATE, step", "step", _session),
        BenchRow("calicache CALIBRATE, pair", "pair", _session),
        BenchRow("calicache CALIBRATE, sampler", "sampler", _session),
    )


def chosen_rows(settings: BenchSettings) -> list[BenchRow]:
    """The rows asked for, the plain one always among them.

    Raises:
        BenchError: a row of an unknown name.
    """
    rows = bench_rows()
    unknown = set(settings.rows) - {row.name for row in rows}
    if unknown:
        raise BenchError(
            "rows",
            expected=" | ".join(row.name for row in rows),
            got=", ".join(sorted(unknown)),
            fix="Choose among these.",
        )
    return [row for row in rows if not settings.rows or row.name in settings.rows or row is rows[0]]


def plan_folder(artifact: Path) -> Path:
    """Where the plan of an artifact is."""
    return artifact.with_name(f"{artifact.name}.plan")


def session_runner(session: Session, task: BenchTask) -> Runner:
    """Runs an artifact in whatever layout it has."""
    if session.manifest.layout is Layout.SAMPLER:
        inputs: dict[str, Any] = dict(task.model.inputs)
        return Runner(run=lambda noise: session.sample(noise, **inputs))
    places = iter(range(0))

    def reset() -> None:
        nonlocal places
        places = iter(range(task.settings.steps))
        session.reset()

    def denoise(**tensors: Any) -> Tensor:
        return torch.from_numpy(session.step(next(places), **tensors))

    return Runner(denoise, reset=reset)


def _session(task: BenchTask) -> Runner:
    return session_runner(Session(task.folder, provider=task.settings.provider), task)


def _optimized(task: BenchTask) -> Runner:
    plan = Plan.load(plan_folder(task.folder))
    fast = optimize(task.model.build(), plan)
    return Runner(fast, reset=fast.reset)


def _hook(order: int) -> Callable[[BenchTask], Runner]:
    """TaylorSeer of diffusers on attention and feed-forward layers; at order 0 it is FORA."""

    def make(task: BenchTask) -> Runner:
        hooks: Any = importlib.import_module("diffusers.hooks")
        context: Any = importlib.import_module("diffusers.hooks.hooks")
        module = task.model.build()
        branches = r"transformer_blocks\.\d+\.(attn\d|ff)"
        if not any(re.fullmatch(branches, name) for name, _ in module.named_modules()):
            raise BenchError(
                "TaylorSeer hook",
                expected=f"modules named {branches}, as in diffusers",
                got="none",
                fix="Its names have to be written for every model.",
            )
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=task.settings.interval,
            disable_cache_before_step=1,
            max_order=order,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[branches],
        )
        hooks.apply_taylorseer_cache(module, config)
        registry = hooks.HookRegistry.check_if_exists_or_initialize(module)

        def denoise(**tensors: Tensor) -> Any:
            context._set_cache_context(module, context.CacheContext("run"))
            return module(**tensors)

        return Runner(denoise, reset=registry.reset_stateful_hooks)

    return make


def _hook_schedule(settings: BenchSettings) -> tuple[StepMode, ...]:
    """The hook computes the first step and the last one of every interval after it."""
    full = {0, *range(settings.interval - 1, settings.steps, settings.interval)}
    return tuple(StepMode.REFRESH if k in full else StepMode.REUSE for k in range(settings.steps))
