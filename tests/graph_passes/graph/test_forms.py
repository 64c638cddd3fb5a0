"""The forms in which models come: other batch sizes, half precision, no weights, torch.compile."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusion import GuidedDDIM
from support.models import relative, sample_dit
from torch import Tensor, nn
from torch._dynamo.utils import counters

from calicache.export import Session, export_onnx
from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.graph_passes.common.errors import PlanError, RunError

STEPS = 6
# float32 rounding, a few layers deep; the modes of a step differ from each other by 1e-3.
SAME = 1e-5


@pytest.fixture(scope="module")
def fast(dit, forecast_plan) -> OptimizedModel:
    """All modes, order 2, output weights; recorded with 2 images, 4 rows."""
    return optimize(dit, forecast_plan)


def sample(model: nn.Module, images: int, row: int = 0) -> Tensor:
    """The first images of one draw of 8, from `row` on."""
    noise = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(8) % 10
    part = slice(row, row + images)
    return GuidedDDIM(STEPS, 1.5, 10).sample(model, noise[part], labels[part])


# --- other batch sizes -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("images", [1, 8])
def test_another_batch_size_gives_what_the_recorded_one_gives(images: int, fast) -> None:
    together = sample(fast, images)
    assert together.shape == (images, 1, 28, 28)
    pairs = torch.cat([sample(fast, 2, row) for row in range(0, 8, 2)])
    # Images of one batch know nothing of each other.
    assert relative(together, pairs[:images]) < SAME
    assert relative(together, sample(fast.original, images)) > 1e-4  # something was calibrated


@pytest.mark.slow
def test_batch_sizes_in_turn_keep_apart(fast) -> None:
    alone = [sample(fast, n) for n in (1, 2, 8)]
    again = [sample(fast, n) for n in (8, 1, 2)]
    # Bit by bit: the same operations on the same values.
    assert torch.equal(again[0], alone[2])
    assert torch.equal(again[1], alone[0])
    assert torch.equal(again[2], alone[1])


def test_factors_are_not_made_again(fast) -> None:
    noise, labels = torch.zeros(16, 1, 28, 28), torch.zeros(16, dtype=torch.int64)
    other = fast.for_call(noise, timestep=torch.zeros(16, dtype=torch.int64), class_labels=labels)
    assert other.compiled.factors.keys() == fast.compiled.factors.keys()
    for name, factors in fast.compiled.factors.items():
        assert other.compiled.factors[name].up is factors.up
    first, own = (model.compiled.variant_set.caches[0] for model in (other, fast))
    assert first.shape[0] == 4 * own.shape[0]
    assert fast.for_call(noise[:4], timestep=labels[:4], class_labels=labels[:4]) is fast


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["step", "pair"])
@pytest.mark.parametrize("images", [1, 8])
def test_an_artifact_for_another_batch_size_agrees(
    images: int, layout: str, fast, tmp_path: Path
) -> None:
    rows = 2 * images
    other = fast.for_call(
        torch.zeros(rows, 1, 28, 28),
        timestep=torch.zeros(rows, dtype=torch.int64),
        class_labels=torch.zeros(rows, dtype=torch.int64),
    )
    export_onnx(other, tmp_path / "d", layout=layout)
    session, steps = Session(tmp_path / "d"), iter(range(STEPS))
    got = sample(lambda **x: torch.from_numpy(session.step(next(steps), **x)), images)
    assert relative(got, sample(fast, images)) < SAME


def test_another_resolution_is_refused_with_the_way_out(fast) -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RunError, match=r"hidden_states: expected float32 \(4, 1, 28, 28\).*record"):
        fast(torch.zeros(4, 1, 32, 32), timestep=labels, class_labels=labels)


def test_sizes_that_change_by_two_ratios_are_refused(fast) -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RunError, match="hidden_states: expected"):
        fast(torch.zeros(8, 1, 28, 28), timestep=labels, class_labels=labels)


@pytest.mark.slow
def test_moving_the_model_moves_what_other_batch_sizes_run(dit, forecast_plan) -> None:
    fast = optimize(copy.deepcopy(dit), forecast_plan)
    sample(fast, 1)
    (recipe,) = fast._recipes.each
    assert recipe.forms._others
    fast.to("cpu")
    assert not recipe.forms._others
    assert torch.isfinite(sample(fast, 1)).all()


# --- half precision ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_keeps_its_dtype(dtype: torch.dtype, dit) -> None:
    model = copy.deepcopy(dit).to(dtype)

    def cast(**inputs: Tensor) -> Tensor:
        wide = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return wide["model"](**wide) if "model" in wide else model(**wide)

    with record(model) as recording:
        exact = sample_dit(cast)
    fast = optimize(model, Plan.from_trajectory(model, recording, schedule=3, rank=8))

    def run(**inputs: Tensor) -> Tensor:
        output = fast(**{k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()})
        assert output.dtype is dtype
        return output

    # bfloat16 has 8 bits (4e-3 an operation), float16 11; the run amplifies both.
    assert relative(sample_dit(run).float(), exact.float()) < 0.1


# --- no weights --------------------------------------------------------------------------------


@pytest.mark.slow
def test_costs_can_be_planned_without_weights(dit, dit_recording: Recording) -> None:
    options = {"schedule": 3, "rank": 4, "weighting": "none", "correct": False}
    meta = copy.deepcopy(dit).to("meta")
    fast = optimize(meta, Plan.from_trajectory(meta, dit_recording, **options))
    real = optimize(dit, Plan.from_trajectory(dit, dit_recording, **options))
    assert fast.compiled.cost == real.compiled.cost
    assert fast.compiled.cost.modes


def test_statistics_without_weights_are_refused_with_the_way_out(dit, dit_recording) -> None:
    with pytest.raises(PlanError, match=r"meta device.*weighting='none', correct=False"):
        Plan.from_trajectory(copy.deepcopy(dit).to("meta"), dit_recording)


# --- torch.compile -----------------------------------------------------------------------------


@pytest.mark.slow
def test_torch_compile_takes_every_variant_as_one_graph(dit, dit_plan) -> None:
    fast = optimize(dit, dit_plan)
    expected = [sample_dit(fast, seed=seed) for seed in (1, 2)]
    torch._dynamo.reset()
    counters.clear()
    # The tracer alone decides on graph breaks; what inductor makes of a graph is torch's.
    compiled = torch.compile(optimize(dit, dit_plan), backend="eager")
    got = [sample_dit(compiled, seed=seed) for seed in (1, 2)]
    for one, other in zip(got, expected, strict=True):
        assert relative(one, other) < SAME
    breaks = " ".join(counters["graph_break"])
    assert "_begin" in breaks  # where a call starts and where it ends, and nowhere else
    assert "_end" in breaks
    assert len(counters["graph_break"]) == 2
    torch._dynamo.reset()
