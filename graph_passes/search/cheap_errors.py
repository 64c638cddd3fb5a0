"""Errors of cheap steps on the recorded latents: what a mode adds when nothing else is wrong."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import prod

from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.kept import Kept, run_step
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.update import latent_channels
from calicache.graph_passes.search.rehearse import Scales
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.schedule import anchor_table, kept_refreshes


def cheap_errors(
    variant_set: VariantSet,
    recorded: RecordedSampler,
    schedule: Sequence[StepMode],
    modes: Collection[StepMode],
    meter: Meter | None = None,
    ranks: Ranks = ALONE,
) -> dict[StepMode, Scales]:
    """Run cheap modes along the recorded latents, with anchors of all orders in turn.

    Args:
        variant_set: the variants of the modes, without output weights.
        recorded: runs with their outputs.
        schedule: which steps REFRESH; all others are tried in every mode, but for FORECAST ones,
            which are not run.
        modes: to try; FORECAST has no output of its own.
        meter: counts the steps of every run of this process.
        ranks: the processes that share the runs.

    Returns:
        By mode: |e_mode - e| over the product of the lags, by number of kept refreshes and step
        (K, T), the root mean square over the parts of e and the sum over the runs. Steps where
        an order was not tried take their neighbours' values. K is 1 for a mode that looks at the
        newest refresh alone.
    """
    probe = partial(_run_squares, variant_set, recorded, schedule, modes, meter)
    by_run = ranks.map(probe, range(len(recorded.runs)))
    squares = {
        mode: [_added(rows) for rows in zip(*(run[mode] for run in by_run), strict=True)]
        for mode in modes
    }
    return {mode: _scales(orders, schedule) for mode, orders in squares.items()}


def _run_squares(
    variant_set: VariantSet,
    recorded: RecordedSampler,
    schedule: Sequence[StepMode],
    modes: Collection[StepMode],
    meter: Meter | None,
    place: int,
) -> dict[StepMode, list[dict[int, float]]]:
    """|e_mode - e|^2 along one run, over the parts of e: by mode, kept refreshes and step."""
    history = variant_set.history
    views = [variant_set.scheduled(anchor_table(schedule, order)) for order in range(history)]
    squares: dict[StepMode, list[dict[int, float]]] = {
        mode: [{} for _ in range(_reach(variant_set, mode))] for mode in modes
    }
    kept: Kept = {}
    for step, call in enumerate(recorded.runs[place]):
        tensors, latent = list(call.values()), call[recorded.steps.latent]
        if schedule[step] is StepMode.REFRESH:
            _, kept = run_step(variant_set, StepMode.REFRESH, kept, step, tensors)
        elif schedule[step] is not StepMode.FORECAST:
            refreshes = schedule[:step].count(StepMode.REFRESH)
            order = (refreshes - 1) % min(refreshes, history)
            for mode in modes:
                own, _ = run_step(views[order], mode, kept, step, tensors)
                off = (latent_channels(own, latent) - recorded.outputs[place][step]).double()
                row = squares[mode][min(order, len(squares[mode]) - 1)]
                row[step] = float(off.square().sum()) / recorded.steps.parts
        if meter:
            meter.add()
    return squares


def _added(rows: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Sums by step."""
    return {step: sum(row[step] for row in rows) for step in rows[0]}


def _reach(variant_set: VariantSet, mode: StepMode) -> int:
    """How many kept refreshes a mode looks at."""
    return 1 + max((slot.back for slot in variant_set.variants[mode].slots.values()), default=0)


def _scales(squares: Sequence[Mapping[int, float]], schedule: Sequence[StepMode]) -> Scales:
    rows: list[tuple[float, ...]] = []
    for order, by_step in enumerate(squares):
        scales = {
            step: square**0.5 / prod(step - p for p in kept_refreshes(schedule, step, order + 1))
            for step, square in by_step.items()
        }
        rows.append(spread_over(scales, len(schedule)) if scales else rows[-1])
    return tuple(rows)


def spread_over(values: Mapping[int, float], steps: int) -> tuple[float, ...]:
    """Values of some steps over all of them: straight lines between, the nearest outside."""
    places = sorted(values)
    row = []
    for step in range(steps):
        before = max((p for p in places if p <= step), default=places[0])
        after = min((p for p in places if p >= step), default=places[-1])
        share = (step - before) / (after - before) if after > before else 0.0
        row.append(values[before] + (values[after] - values[before]) * share)
    return tuple(row)
