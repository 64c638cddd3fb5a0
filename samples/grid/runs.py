"""One row of a cell made ready and sampled: its plan, its artifact, its latents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cells import Cell
from grid_shared import PeerRun
from rows import AtOutput, Fewer, Planned, Row, Schedule, Searched, computed_steps
from schedulers import Denoiser, denoise
from subjects import Request, Subject
from torch import Tensor, nn
from tqdm import tqdm

from calicache import (
    LatencyTable,
    Plan,
    Recording,
    Session,
    StepMode,
    export_onnx,
    optimize,
    record,
)
from calicache.export import measure_latency
from calicache.graph_passes import uniform_schedule

BATCH = 16
RECORD_SEED, CHOICE_SEED, REPORT_SEED = 1, 2, 1000
SEARCH_SEEDS = (11, 12, 13)
PLAIN = "plain"
FINER = 8  # times as many steps has a reference


@dataclass(frozen=True, slots=True)
class Bench:
    """A cell at work.

    Attributes:
        cell: the case.
        subject: its model.
        folder: where artifacts and results lie.
    """

    cell: Cell
    subject: Subject
    folder: Path

    def artifact(self, name: str) -> Path:
        """Of a row's key, or of the plain model."""
        return self.folder / f"{name}.onnx.d"

    def session(self, row: Row) -> Session:
        """What computes a row: its own artifact, or the plain model's."""
        own = isinstance(row.way, Planned | Searched)
        return Session(self.artifact(row.key if own else PLAIN))

    def sample_in(self, session: Session, row: Row, schedule: Schedule, seed: int) -> Tensor:
        """Final latents of one batch in ONNX Runtime."""
        steps = iter(_called_steps(row, schedule, self.cell.steps))

        def model(**inputs: Tensor) -> Tensor:
            return torch.from_numpy(session.step(next(steps), **inputs))

        session.reset()
        return self.sample(row, schedule, model, self.request(seed))

    def batches(self, row: Row, schedule: Schedule, images: int) -> Iterator[Tensor]:
        """Final latents of so many unseen seeds in ONNX Runtime, batch by batch."""
        session = self.session(row)
        for part in tqdm(range(images // BATCH), desc=f"{self.cell.key}: {row.key}", leave=False):
            yield self.sample_in(session, row, schedule, REPORT_SEED + part)

    def request(self, seed: int) -> Request:
        """Noise and conditions of one batch."""
        return self.subject.draw(seed, BATCH)

    def record(self, seeds: Sequence[int], row: Row) -> Recording:
        """The plain model under a row's sampler, one run for every seed."""
        model = self.subject.model
        with record(model) as recording:
            for seed in seeds:
                recording.finish(self.sample(row, (), model, self.request(seed)))
        return recording

    @property
    def full_row(self) -> Row:
        """The plain model in all steps of the cell."""
        cell = self.cell
        return Row("full", f"{cell.steps} steps", Fewer(cell.sampler, cell.steps))

    @property
    def reference_row(self) -> Row:
        """The plain model in many more steps."""
        cell, steps = self.cell, FINER * self.cell.steps
        return Row("reference", f"{steps} steps", Fewer(cell.sampler, steps))

    def full(self, model: Denoiser, request: Request) -> Tensor:
        """Final latents of all the cell's steps, by the model or a plan for it."""
        noise, conditions = request
        cell = self.cell
        return denoise(model, noise, conditions, cell.sampler, cell.steps, cell.scale)

    def sample(self, row: Row, schedule: Schedule, model: Denoiser, request: Request) -> Tensor:
        """Final latents of a row; `model` computes what the row computes."""
        noise, conditions = request
        match row.way:
            case Fewer(sampler, steps):
                return denoise(model, noise, conditions, sampler, steps, self.cell.scale)
            case AtOutput(peer):
                computed = computed_steps(schedule)
                return self.full(PeerRun(model, peer, computed), request)
        return self.full(model, request)


def _called_steps(row: Row, schedule: Schedule, steps: int) -> Sequence[int]:
    """The steps at which a row calls its session: all but those that a peer makes up."""
    if isinstance(row.way, Fewer):
        return [step % steps for step in range(row.way.steps)]
    return computed_steps(schedule) if isinstance(row.way, AtOutput) else range(steps)


@dataclass(frozen=True, slots=True)
class Material:
    """What the plans of a cell are made from.

    Attributes:
        recording: of one batch, for plans from a trajectory.
        searched: of several batches, for searches.
        reference: the same runs in many more steps.
        plain: a plan of REFRESH steps alone, with what was made of the model on the way.
        table: seconds of the cell's steps.
    """

    recording: Recording
    searched: Recording
    reference: Recording
    plain: Plan
    table: LatencyTable


def prepare_material(bench: Bench, rank: int) -> Material:
    """Record, write the plain artifact, and measure what steps take if that was not done.

    Args:
        bench: the cell at work.
        rank: of the paper's calibration branches.
    """
    model, table_path = bench.subject.model, bench.folder / "latency.json"
    recording = bench.record([RECORD_SEED], bench.full_row)
    every_step = uniform_schedule(bench.cell.steps, 1)
    plain = Plan.from_trajectory(model, recording, schedule=every_step, rank=1, correct=False)
    if not bench.artifact(PLAIN).exists():
        export_onnx(optimize(model, plain), bench.artifact(PLAIN))
    if not table_path.exists():
        measure_latency(model, recording, ranks=[rank]).save(table_path)
    table = LatencyTable.load(table_path)
    runs = (bench.record(SEARCH_SEEDS, row) for row in (bench.full_row, bench.reference_row))
    return Material(recording, *runs, plain, table)


def prepare(bench: Bench, row: Row, material: Material) -> Schedule:
    """Choose a row's schedule and write its artifact, where it has one.

    Returns:
        The schedule; empty for fewer steps.
    """
    path = bench.folder / f"{row.key}.schedule.json"
    if path.exists():
        return tuple(map(StepMode.of, json.loads(path.read_text())))
    schedule, plan = _schedule_and_plan(bench, row, material)
    if plan is not None:
        export_onnx(optimize(bench.subject.model, plan), bench.artifact(row.key))
    path.write_text(json.dumps([mode.name for mode in schedule]))
    return schedule


def _schedule_and_plan(bench: Bench, row: Row, material: Material) -> tuple[Schedule, Plan | None]:
    model = bench.subject.model
    match row.way:
        case Fewer():
            return (), None
        case AtOutput():
            return row.schedules[_best(bench, row, [model] * len(row.schedules))], None
        case Searched(aims):
            reference = material.reference if aims else None
            plan = Plan.search(
                model,
                material.searched,
                budget=row.budget,
                latency=material.table,
                reference=reference,
            )
            return plan.recipe.schedule, plan
        case Planned(options):
            plans = [
                Plan.from_trajectory(
                    model,
                    material.recording,
                    schedule=schedule,
                    workspace=material.plain.workspace,
                    **options,
                )
                for schedule in row.schedules
            ]
            place = _best(bench, row, [optimize(model, plan) for plan in plans])
            return row.schedules[place], plans[place]


def _best(bench: Bench, row: Row, models: Sequence[nn.Module]) -> int:
    """The place of the schedule with the smallest error on the seeds for choosing."""
    if len(models) == 1:
        return 0
    request = bench.request(CHOICE_SEED)
    full = bench.full(bench.subject.model, request)
    errors = [
        float((bench.sample(row, schedule, model, request) - full).norm())
        for schedule, model in zip(row.schedules, models, strict=True)
    ]
    return errors.index(min(errors))
