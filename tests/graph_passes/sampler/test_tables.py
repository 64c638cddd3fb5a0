"""Sampler tables from recorded runs: the guided update, the step's inputs, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from calicache.graph_passes.common.errors import NoSampler
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.sampler.recover import RecordedSampler
from calicache.graph_passes.sampler.tables import recover_tables
from calicache.graph_passes.sampler.update import SamplerSteps

STEPS, SCALE = 4, 2.0
DEPENDENCE = {
    "x": Dependence.LATENT,
    "timestep": Dependence.STEP,
    "labels": Dependence.RUN,
    "table": Dependence.CONSTANT,
}
UPDATES = [(1.0, -0.1 * (1 + k)) for k in range(STEPS)]


def draw(seed: int, rows: int) -> Tensor:
    draw_ = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, 4, 4, generator=draw_, dtype=torch.float64)


def recorded(runs: int = 2) -> RecordedSampler:
    """Guided runs of x' = x + b_k (u + s (c - u)), whose labels differ from run to run."""
    rows = tuple((a, b * SCALE, b * (1 - SCALE)) for a, b in UPDATES)
    steps = SamplerSteps("x", 2, rows)
    calls, outputs, ends = [], [], []
    for seed in range(runs):
        x, run, outs = torch.cat([draw(seed, 1)] * 2), [], []
        for k in range(STEPS):
            timestep, labels = torch.full((2,), 9.0 - k), torch.tensor([seed, 10])
            run.append({"x": x, "timestep": timestep, "labels": labels, "table": torch.ones(1)})
            outs.append(draw(100 * seed + k, 2))
            x = steps.next_latent(k, steps.terms(x, outs[-1]), ())
        calls.append(run)
        outputs.append(tuple(outs))
        ends.append(x[:1])
    return RecordedSampler(tuple(calls), tuple(outputs), tuple(ends), steps)


def test_tables_hold_the_guided_update_and_the_inputs_of_the_step() -> None:
    tables = recover_tables(recorded(), DEPENDENCE)
    assert (tables.latent, tables.parts, tables.conditional) == ("x", 2, 0)
    # float64 least squares to exact sums, in two fits.
    assert tables.guidance == pytest.approx(SCALE, rel=1e-9)
    for row, (a, b) in zip(tables.updates, UPDATES, strict=True):
        assert row == pytest.approx((a, b, 0.0, 0.0), rel=1e-9, abs=1e-12)
    assert not tables.looks_back
    assert tables.scales == (1.0,) * STEPS
    assert list(tables.inputs) == ["timestep"]
    assert torch.equal(tables.inputs["timestep"][:, 0], 9.0 - torch.arange(STEPS))


def test_run_without_its_result_is_refused() -> None:
    runs = recorded()
    unfinished = replace(runs, ends=(runs.ends[0], None))
    with pytest.raises(NoSampler, match="a run without its result"):
        recover_tables(unfinished, DEPENDENCE)


def test_input_of_the_step_that_differs_from_run_to_run_is_refused() -> None:
    runs = recorded()
    runs.runs[1][2]["timestep"] = torch.zeros(2)
    with pytest.raises(NoSampler, match="input timestep is not the same in every run"):
        recover_tables(runs, DEPENDENCE)


def test_second_input_that_changes_as_the_latent_does_is_refused() -> None:
    with pytest.raises(NoSampler, match="input labels is not the same in every run"):
        recover_tables(recorded(1), {**DEPENDENCE, "labels": Dependence.LATENT})
