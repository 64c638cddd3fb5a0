"""A plan in a few lines: what it does, and what its steps take where that was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from model import FashionDiT
from support.search.fronts import front_of

from calicache import LatencyTable, Plan, Recording, optimize
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.latency import BranchChoice, LatencyRow

LINEAR, REUSE = BranchChoice.LINEAR, BranchChoice.REUSE


def table(plan: Plan, *rows: LatencyRow, forecast: float = 0.125) -> LatencyTable:
    """Against a plain step of one second, in binary fractions."""
    return LatencyTable(plan.binding.weights_hash, "a runtime", 2, 1.0, forecast, rows)


def linear(low: float, high: float) -> tuple[LatencyRow, ...]:
    group = "blocks.*.mlp"
    return LatencyRow(group, LINEAR, 10, 1.0, low), LatencyRow(group, LINEAR, 20, 1.0, high)


def test_without_seconds_it_says_what_the_plan_does(forecast_plan: Plan) -> None:
    steps, calibrate, weights, error = forecast_plan.describe().splitlines()
    assert steps == "6 steps: 3 REFRESH + 1 CALIBRATE + 1 REUSE + 1 FORECAST"
    assert "rank 4, order 2, weighting covariance" in calibrate
    assert weights == f"output weights: {forecast_plan.recipe.correction}"
    assert forecast_plan.in_sample is not None
    mean, samples = forecast_plan.in_sample.mean, forecast_plan.in_sample.samples
    assert error.startswith(f"error: {mean:.3g} in sample, over {samples} recorded sample")


def test_an_error_that_was_not_measured_is_said_to_be_so(dit_plan: Plan) -> None:
    *_, error = dit_plan.with_rank(2).describe().splitlines()
    assert error == "error: not measured"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.25, 0.5, "take 0.25 to 0.50 of a plain step in a runtime"),
        (0.75, 1.25, "slower than plain here at high ranks"),
        (1.25, 1.5, "SLOWER than plain here"),
        (1.0, 1.0, "take 1.00 of a plain step in a runtime: SLOWER than plain here"),
    ],
)
def test_a_mode_that_is_slower_here_is_named(
    low: float, high: float, said: str, dit_plan: Plan
) -> None:
    (line,) = (
        line
        for line in dit_plan.describe(table(dit_plan, *linear(low, high))).splitlines()
        if line.startswith("CALIBRATE steps take")
    )
    assert said in line
    assert ("slower" in line.lower()) == (high >= 1)


def test_every_mode_with_seconds_has_a_line(forecast_plan: Plan) -> None:
    rows = (*linear(0.25, 0.5), LatencyRow("blocks.*.mlp", REUSE, 0, 1.0, 1.5))
    lines = forecast_plan.describe(table(forecast_plan, *rows, forecast=0.125)).splitlines()
    assert [line.partition(" steps take")[0] for line in lines[-3:]] == [
        "CALIBRATE",
        "REUSE",
        "FORECAST",
    ]
    assert ["SLOWER" in line for line in lines[-3:]] == [False, True, False]
    assert len(lines) < 10


def test_a_searched_plan_tells_its_promise(forecast_plan: Plan) -> None:
    plan = replace(forecast_plan, front=front_of([0.25, 0.5], [0.02, 0.01], choice=1))
    text = plan.describe()
    assert "cost: 0.500 of the full run, in MACs" in text
    assert "by budget 0.5" in text


def test_values_print_in_a_few_lines(
    dit: FashionDiT, dit_recording: Recording, forecast_plan: Plan
) -> None:
    plan = replace(forecast_plan, front=front_of([0.25, 0.5], [0.02, 0.01], choice=1))
    texts = [repr(value) for value in (dit_recording, plan, optimize(dit, forecast_plan))]
    assert [text.splitlines()[0] for text in texts] == [
        "Recording of 6 calls in 1 runs, none finished",
        f"Plan for weights {plan.binding.weights_hash[:12]}",
        "FashionDiT optimised by calicache",
    ]
    assert all(2 <= len(text.splitlines()) < 10 for text in texts)


def test_seconds_of_other_weights_are_refused(dit_plan: Plan) -> None:
    with pytest.raises(PlanError) as caught:
        dit_plan.describe(replace(table(dit_plan), weights_hash="0" * 64))
    assert caught.value.where == "latency"
