"""What is compared in a cell: peers, the paper, and calicache's own plans, at every budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cells import BUDGETS, Cell, file_name
from grid_shared import (
    DynamicModes,
    ForecastCalibrate,
    LinearPredictor,
    Peer,
    Spectrum,
    TaylorSeerLite,
    fit_weights,
)
from torch import Tensor

from calicache import LatencyTable, StepMode
from calicache.graph_passes import spread_schedule, uniform_schedule
from calicache.graph_passes.settings.latency import BranchChoice

Schedule = tuple[StepMode, ...]

INT8_INTERVALS = (3, 6, 12)
WEIGHTINGS = ("none", "activation", "increment")


@dataclass(frozen=True, slots=True)
class Fewer:
    """The plain model with a sampler of fewer steps."""

    sampler: str
    steps: int


@dataclass(frozen=True, slots=True)
class AtOutput:
    """A peer that says what skipped steps return."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan from the recorded trajectory; `options` are of `Plan.from_trajectory`."""

    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Searched:
    """A plan from `Plan.search` under the row's budget; `aims` at a reference of more steps."""

    aims: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One way to sample.

    Attributes:
        family: the curve that it belongs to.
        label: what tells it from others of the family.
        way: how skipped steps come about.
        schedules: candidates, the best of which on seeds of their own is taken.
        budget: that it was made for; None for a row that stands where it stands.
    """

    family: str
    label: str
    way: Fewer | AtOutput | Planned | Searched
    schedules: tuple[Schedule, ...] = ()
    budget: float | None = None

    @property
    def key(self) -> str:
        """A file name."""
        return file_name(f"{self.family} {self.label}")

    @property
    def is_ours(self) -> bool:
        """Whether it is calicache's, and not a peer's or the paper's."""
        return self.family.startswith(OURS)


OURS = ("ours", "searched")
SOLVERS = {"fashion": ("DDIM", "DPM-Solver++ 2M"), "scenes": ("Euler", "DPM-Solver++ 2M, flow")}


@dataclass(frozen=True, slots=True)
class Shares:
    """A REFRESH step and a cheap one against a plain step, in seconds."""

    refresh: float
    step: float

    def refreshes(self, steps: int, budget: float) -> int:
        """The most REFRESH steps of a run that stays within a share of the full run's time."""
        return math.floor(steps * (budget - self.step) / (self.refresh - self.step) + 1e-9)


def shares_of(table: LatencyTable, choice: BranchChoice) -> Shares:
    """Of steps in which every branch is so treated, at the smallest rank that was measured."""
    rows = [row for row in table.rows if row.choice is choice]
    groups = {row.group: row for row in sorted(rows, key=lambda row: -row.macs)}
    writes = sum(row.refresh - table.full_refresh for row in groups.values())
    step = table.step_shares(choice)
    if step is None:
        raise ValueError(f"the latency table has no row of {choice}")
    return Shares((table.full_refresh + max(0.0, writes)) / table.plain, step[0])


def grid_rows(cell: Cell, table: LatencyTable, outputs: Tensor, rank: int) -> list[Row]:
    """Every row of a cell but the full run.

    Args:
        cell: the case.
        table: seconds of its steps.
        outputs: of the model at every step of recorded runs, (steps, B, ...).
        rank: of the paper's calibration branches.
    """
    rows: list[Row] = []
    for budget in BUDGETS:
        rows += _solvers(cell, budget)
        rows += _at_output(cell, budget, table, outputs)
        rows += _inside(cell, budget, table, rank)
        rows.append(Row("searched", f"budget {budget:g}", Searched(), budget=budget))
        aimed = Searched(aims=True)
        rows.append(Row("searched with a reference", f"budget {budget:g}", aimed, budget=budget))
    rows += _integers(cell)
    return list({row.key: row for row in rows}.values())


def even_schedules(steps: int, refreshes: int, mode: StepMode) -> tuple[Schedule, ...]:
    """Two ways to space so many REFRESH steps evenly: to the last step, or by an interval."""
    spread = spread_schedule(steps, refreshes, 1.0, mode)
    interval = uniform_schedule(steps, math.ceil(steps / refreshes), mode)
    return tuple(dict.fromkeys((spread, interval)))


def computed_steps(schedule: Schedule) -> list[int]:
    """The steps that compute the model in full, ascending."""
    return [step for step, mode in enumerate(schedule) if mode is StepMode.REFRESH]


def _solvers(cell: Cell, budget: float) -> list[Row]:
    steps = math.floor(cell.steps * budget + 1e-9)
    return [
        Row(sampler, f"{steps} steps", Fewer(sampler, steps), budget=budget)
        for sampler in SOLVERS[cell.subject]
        if steps >= 1
    ]


def _at_output(cell: Cell, budget: float, table: LatencyTable, outputs: Tensor) -> list[Row]:
    """Caching methods at the final output, see peers.py, and forecasts of calicache's own.

    Spectrum and L2P stand as published, and in a form that was better on the sample DiT.
    """
    count = Shares(1.0, table.forecast / table.plain).refreshes(cell.steps, budget)
    if count < 1:
        return []
    schedules = even_schedules(cell.steps, count, StepMode.FORECAST)
    peers: dict[str, Peer] = {
        "TaylorSeer-Lite": TaylorSeerLite(),
        "Spectrum": Spectrum(cell.steps),
        "Spectrum, small ridge": Spectrum(cell.steps, ridge=0.001, share=0.75),
        "DMD": DynamicModes(),
        "FoCa": ForecastCalibrate(),
        "L2P": LinearPredictor(fit_weights(outputs, ridge=0.0003)),
    }
    label = f"{count} REFRESH of {cell.steps}"
    rows = [Row(name, label, AtOutput(peer), schedules, budget) for name, peer in peers.items()]
    for number, schedule in enumerate(schedules):
        peer = LinearPredictor(fit_weights(outputs, computed_steps(schedule)))
        spacing = ("to the end", "by an interval")[number]
        name = f"{label}, {spacing}"
        rows.append(Row("L2P, computed outputs", name, AtOutput(peer), (schedule,), budget))
    order_2 = Planned({"order": 2, "correct": False, "rank": 1})
    rows.append(Row("TaylorSeer at the output", label, order_2, schedules, budget))
    rows.append(Row("ours, even FORECAST", label, Planned({"rank": 1}), schedules, budget))
    return rows


def _inside(cell: Cell, budget: float, table: LatencyTable, rank: int) -> list[Row]:
    """Methods that cache inside the model: FORA, TaylorSeer, and the paper's three weightings."""
    ways: list[tuple[str, StepMode, BranchChoice, dict[str, Any]]] = [
        (f"{name}, order {order}", StepMode.REUSE, BranchChoice.REUSE, {"order": order, "rank": 1})
        for order, name in enumerate(("FORA", "TaylorSeer", "TaylorSeer"))
    ]
    ways += [
        (
            f"paper, {weighting}",
            StepMode.CALIBRATE,
            BranchChoice.LINEAR,
            {"order": 0, "rank": rank, "weighting": weighting},
        )
        for weighting in WEIGHTINGS
    ]
    rows = []
    for family, mode, choice, options in ways:
        most = shares_of(table, choice).refreshes(cell.steps, budget)
        # The table is of order 2: one REFRESH step more may fit at a lower one.
        for count in range(max(1, most), min(most + 2, cell.steps)):
            schedules = even_schedules(cell.steps, count, mode)
            label = f"{count} REFRESH of {cell.steps}"
            way = Planned({**options, "correct": False})
            rows.append(Row(family, label, way, schedules, budget))
    return rows


def _integers(cell: Cell) -> list[Row]:
    """Increments in int8 at every step but each n-th."""
    return [
        Row(
            "ours, int8",
            f"interval {interval}",
            Planned({"branch": "int8"}),
            (uniform_schedule(cell.steps, interval),),
        )
        for interval in INT8_INTERVALS
        if interval < cell.steps
    ]
