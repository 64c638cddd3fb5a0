"""What a notebook shows of plans and optimised models."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from support.search.fronts import front_of
from support.small.subjects import small_model, small_plan, small_runs
from torch import nn

from calicache.graph_passes import OptimizedModel, Plan, StepMode, optimize
from calicache.graph_passes.settings.choices import STEP_LETTERS


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_model()


@pytest.fixture(scope="module")
def plan(model: nn.Module) -> Plan:
    return small_plan(model, small_runs(model))


@pytest.fixture(scope="module")
def fast(model: nn.Module, plan: Plan) -> OptimizedModel:
    return optimize(model, plan)


def rows(html: str) -> list[list[str]]:
    """Texts of all table rows; the HTML is well-formed XML, so that nothing is left open."""
    root = ElementTree.fromstring(html)
    return [["".join(cell.itertext()) for cell in row] for row in root.iter("tr")]


def facts(html: str) -> dict[str, str]:
    return {row[0]: row[1] for row in rows(html) if len(row) == 2}


def test_every_mode_has_a_letter_of_its_own() -> None:
    assert len({STEP_LETTERS[mode] for mode in StepMode}) == len(StepMode)


def test_plan_shows_schedule_settings_and_statistics(plan: Plan) -> None:
    entries = facts(plan._repr_html_())
    assert entries["schedule"] == "RCRURF"
    assert entries["steps"] == "6: 3 REFRESH (R), 1 CALIBRATE (C), 1 REUSE (U), 1 FORECAST (F)"
    assert entries["settings"].startswith("rank 4, order 1, weighting covariance")
    assert entries["statistics"] == "of 3 targets"
    assert entries["output weights"] == "fitted to the recorded runs"
    assert entries["weights"] == plan.binding.weights_hash[:16]
    assert "cost" not in entries
    assert plan.in_sample is not None
    assert entries["error"].startswith(f"{plan.in_sample.mean:.3g} in sample")


def test_plan_of_a_search_shows_cost_and_front(plan: Plan) -> None:
    searched = replace(plan, front=front_of((0.3, 0.5), (0.1, 0.01), choice=1))
    html = searched._repr_html_()
    assert facts(html)["cost"] == "0.500 of the full run, in MACs"
    points = rows(html)[-2:]
    assert [row[:2] for row in points] == [["0", "0.300"], ["1 (taken)", "0.500"]]
    assert "Front of a search, budget 0.5" in html


def test_text_of_the_user_is_escaped(plan: Plan) -> None:
    front = replace(front_of((0.3,), (0.1,), choice=0), request="<script>alert(1)</script>")
    recipe = replace(plan.recipe, correction="a < b & c")
    html = replace(plan, recipe=recipe, front=front)._repr_html_()
    assert "<script>" not in html
    assert facts(html)["output weights"] == "a < b & c"


def test_optimised_model_shows_sites_cost_and_caches(fast: OptimizedModel) -> None:
    html = fast._repr_html_()
    entries = facts(html)
    assert html.startswith("<div><b>Small optimised by calicache</b>")
    assert entries["schedule"] == "RCRURF"
    share = fast.compiled.cost.run_share(fast.plan.schedule)
    assert entries["cost"] == f"{share:.3f} of the full run, in MACs"
    assert entries["sites"] == "6 in 3 residual branches, 2 left alone"
    assert entries["calibration branches"].startswith("3; rank 4")
    size = f"{fast.compiled.cost.cache_bytes:,} bytes"
    assert entries["caches"] == f"8 values, 2 refreshes of each at most, {size}"
    totals = {row[0]: row[1:] for row in rows(html) if len(row) == 4}
    assert totals["CALIBRATE"] == [
        "1",
        f"{fast.compiled.cost.modes[StepMode.CALIBRATE]:,}",
        f"{fast.compiled.cost.modes[StepMode.CALIBRATE] / fast.compiled.cost.plain_macs:.3f}",
    ]


def test_it_is_not_the_original_model_that_is_shown(model: nn.Module, plan: Plan) -> None:
    """Other attributes are the original model's; this one is not."""
    object.__setattr__(model, "_repr_html_", lambda: "the original")
    assert optimize(model, plan)._repr_html_() != "the original"
    object.__delattr__(model, "_repr_html_")


@pytest.mark.slow
def test_showing_a_plan_needs_no_tools() -> None:
    script = (
        "import sys; from calicache.graph_passes import OptimizedModel, Plan; "
        "print([n for n in sys.modules if n.startswith(('calicache.tools', 'calicache.export'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
