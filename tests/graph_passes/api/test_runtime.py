"""OptimizedModel as its caller sees it: the call, the steps, the runs, the refusals."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from model import FashionDiT
from support.models import STEPS, relative, sample_dit, shake
from torch import Tensor, nn

from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.common.errors import CalicacheWarning, RunError

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode
SCHEDULE = (REFRESH, CALIBRATE, REUSE, REFRESH, CALIBRATE, REUSE)

Calls = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def optimized(dit: FashionDiT, dit_plan: Plan) -> OptimizedModel:
    return optimize(dit, dit_plan.with_schedule(SCHEDULE))


@pytest.fixture
def fast(optimized: OptimizedModel) -> OptimizedModel:
    optimized.reset()
    return optimized


@pytest.fixture
def calls(dit_recording: Recording) -> Calls:
    return [dict(call) for call in dit_recording.calls]


@pytest.fixture(scope="module")
def fast_diffusers(
    diffusers_dit: DiTTransformer2DModel, diffusers_recording: Recording
) -> OptimizedModel:
    plan = Plan.from_trajectory(
        diffusers_dit, diffusers_recording, rank=4, schedule=(REFRESH, CALIBRATE, CALIBRATE)
    )
    return optimize(diffusers_dit, plan)


def whole_run(model: Callable[..., Tensor], calls: Calls) -> list[Tensor]:
    return [model(**call).clone() for call in calls]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)  # the same program on the same numbers


# --- the call ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_output_object_of_diffusers_comes_back(
    fast_diffusers: OptimizedModel, diffusers_recording: Recording
) -> None:
    fast_diffusers.reset()
    for call in diffusers_recording.calls[:3]:
        output = fast_diffusers(**call)
        assert type(output) is Transformer2DModelOutput
        assert output.sample.shape == (4, 8, 8, 8)
    assert fast_diffusers.step == 3


def test_either_way_to_return_outputs_is_followed(diffusers_dit: DiTTransformer2DModel) -> None:
    inputs = {"class_labels": torch.tensor([1, 2])}
    with record(diffusers_dit) as recording:
        for t in (9, 5):
            x = torch.randn(2, 4, 8, 8)
            inputs["timestep"] = torch.full((2,), t)
            expected = diffusers_dit(x, **inputs, return_dict=False)
    plan = Plan.from_trajectory(diffusers_dit, recording, rank=2, schedule=(REFRESH, REFRESH))
    fast = optimize(diffusers_dit, plan)
    got = fast(x, **inputs, return_dict=False)
    assert type(got) is tuple
    # REFRESH runs the model's own kernels: float32 rounding at most.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    again = fast(x, **inputs)  # captured once more
    assert type(again) is Transformer2DModelOutput
    torch.testing.assert_close(again.sample, expected[0], rtol=1e-5, atol=1e-6)


def test_plain_tensor_comes_back(fast: OptimizedModel, calls: Calls) -> None:
    assert type(fast(**calls[0])) is Tensor


def test_arguments_by_position_and_by_name_are_the_same(fast: OptimizedModel, calls: Calls) -> None:
    by_name = whole_run(fast, calls)
    fast.reset()
    first, *rest = calls
    x, timestep, labels = first.values()
    mixed = [fast(x, class_labels=labels, timestep=timestep)]
    assert_equal([*mixed, *(fast(*call.values()) for call in rest)], by_name)


def test_attributes_of_the_original_are_visible(
    fast: OptimizedModel,
    dit: FashionDiT,
    fast_diffusers: OptimizedModel,
    diffusers_dit: DiTTransformer2DModel,
) -> None:
    assert fast.config is dit.config
    assert fast.null_class == 10
    assert fast.blocks is dit.blocks
    assert fast_diffusers.config.in_channels == 4
    assert fast_diffusers.dtype == torch.float32
    assert fast_diffusers.device == torch.device("cpu")
    assert fast_diffusers.transformer_blocks is diffusers_dit.transformer_blocks
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fast.no_such_name


def test_it_stays_in_eval_mode_and_says_so(fast: OptimizedModel) -> None:
    assert fast.eval() is fast
    assert fast.train(False) is fast
    with pytest.warns(CalicacheWarning, match="Train the original model"):
        assert fast.train() is fast
    with pytest.warns(CalicacheWarning):
        nn.ModuleList([fast]).train()
    assert not any(module.training for module in fast.modules())


# --- steps and runs ---------------------------------------------------------------------------


def test_steps_are_counted(fast: OptimizedModel, calls: Calls) -> None:
    seen = []
    for call in calls:
        seen.append(fast.step)
        fast(**call)
    assert [*seen, fast.step] == [0, 1, 2, 3, 4, 5, 6]


def test_steps_run_the_variants_of_the_schedule(fast: OptimizedModel, calls: Calls) -> None:
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, mode=mode: ran.append(mode))
        for mode, module in fast.variants.items()
    ]
    whole_run(fast, calls)
    for handle in handles:
        handle.remove()
    assert ran == [mode.name for mode in SCHEDULE]


def test_next_run_starts_by_itself(fast: OptimizedModel, calls: Calls) -> None:
    assert_equal(whole_run(fast, calls), whole_run(fast, calls))


@pytest.mark.parametrize("broken_off", range(1, STEPS))
def test_run_broken_off_is_forgotten(fast: OptimizedModel, calls: Calls, broken_off: int) -> None:
    expected = whole_run(fast, calls)
    fast.reset()
    other = [{**call, "hidden_states": -call["hidden_states"]} for call in calls]
    whole_run(fast, other[:broken_off])
    assert_equal(whole_run(fast, calls), expected)


@pytest.mark.slow
def test_run_that_fails_goes_on_where_it_was(fast: OptimizedModel, calls: Calls) -> None:
    expected = whole_run(fast, calls)
    fast.reset()
    got = []
    for call in calls:
        with pytest.raises(RunError):
            fast(**{**call, "hidden_states": call["hidden_states"][:1]})
        got.append(fast(**call))
    assert_equal(got, expected)


def test_reset_starts_a_run(fast: OptimizedModel, calls: Calls) -> None:
    expected = whole_run(fast, calls[:3])
    fast.reset()
    assert fast.step == 0
    assert_equal(whole_run(fast, calls[:3]), expected)


def test_reset_lets_go_of_the_caches(fast: OptimizedModel, calls: Calls) -> None:
    kept: list[weakref.ref[Tensor]] = []
    handle = fast.variants["REFRESH"].register_forward_hook(
        lambda _module, _args, outputs: kept.extend(map(weakref.ref, outputs[1:]))
    )
    fast(**calls[0])
    handle.remove()
    assert kept
    assert all(cache() is not None for cache in kept)
    fast.reset()
    assert all(cache() is None for cache in kept)


class Residual(nn.Module):
    """No timestep: every layer sees the tokens alone, the first one the caller's own tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = x + torch.tanh(self.first(x))
        return hidden, hidden + torch.tanh(self.second(hidden))


@pytest.fixture(scope="module")
def fast_residual() -> OptimizedModel:
    model = shake(Residual())
    with record(model) as recording:
        for _ in range(3):
            model(torch.randn(2, 5, 64))
    plan = Plan.from_trajectory(model, recording, rank=4, schedule=(REFRESH, CALIBRATE, REUSE))
    return optimize(model, plan)


def test_model_without_a_timestep_starts_again_after_the_last_step(
    fast_residual: OptimizedModel,
) -> None:
    fast_residual.reset()
    inputs = [torch.randn(2, 5, 64) for _ in range(3)]
    first, second = ([fast_residual(x)[1] for x in inputs] for _ in range(2))
    assert fast_residual.step == 3
    assert_equal(second, first)
    fast_residual(inputs[0])
    assert fast_residual.step == 1


@pytest.mark.parametrize("written", ["input", "output"])
def test_caches_survive_a_sampler_that_writes_in_place(written: str) -> None:
    model = shake(Residual())
    with record(model) as recording:
        for _ in range(3):
            model(torch.randn(2, 5, 64))
    schedule = (REFRESH, CALIBRATE, REFRESH)  # one cheap step for two: folding does not pay
    plan = Plan.from_trajectory(
        model, recording, rank=64, schedule=schedule, order=0, correct=False
    )
    fast = optimize(model, plan)
    assert all(
        cache.folded is None for cache in fast.compiled.variant_set.caches
    )  # x_ref itself is kept
    first, second = torch.randn(2, 2, 5, 64)
    fast(first)
    expected = fast(second)[1]
    fast.reset()
    latents = first.clone()
    output = fast(latents)
    latents.copy_(second)
    if written == "output":
        for value in output:
            value.zero_()
    assert_equal([fast(latents)[1]], [expected])


def test_two_optimised_models_share_no_state(
    dit: FashionDiT, fast: OptimizedModel, calls: Calls
) -> None:
    other = optimize(dit, fast.plan)
    expected = whole_run(fast, calls)
    fast.reset()
    flipped = [{**call, "hidden_states": -call["hidden_states"]} for call in calls]
    got = []
    for call, flip in zip(calls, flipped, strict=True):
        got.append(fast(**call))
        other(**flip)
    assert_equal(got, expected)
    other.reset()
    assert (fast.step, other.step) == (6, 0)


def test_copy_has_state_of_its_own(fast: OptimizedModel, calls: Calls) -> None:
    expected = whole_run(fast, calls)
    fast.reset()
    whole_run(fast, calls[:1])
    twin = copy.deepcopy(fast)
    fast.reset()
    assert twin.step == 1
    assert_equal(whole_run(twin, calls[1:]), expected[1:])


def test_copy_that_was_written_and_read_gives_the_same_run(
    fast: OptimizedModel, calls: Calls
) -> None:
    expected = whole_run(fast, calls)
    again = pickle.loads(pickle.dumps(fast))
    assert (again.plan.binding, again.plan.recipe) == (fast.plan.binding, fast.plan.recipe)
    assert again.compiled.cost == fast.compiled.cost
    again.reset()
    assert_equal(whole_run(again, calls), expected)


def test_copy_that_was_written_in_the_middle_of_a_run_goes_on_there(
    fast: OptimizedModel, calls: Calls
) -> None:
    expected = whole_run(fast, calls)
    fast.reset()
    whole_run(fast, calls[:2])
    again = pickle.loads(pickle.dumps(fast))
    fast.reset()
    assert again.step == 2
    assert_equal(whole_run(again, calls[2:]), expected[2:])


@pytest.mark.slow
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))])
def test_copies_run_other_batch_sizes(
    fast: OptimizedModel, calls: Calls, twin_of: Callable[[OptimizedModel], OptimizedModel]
) -> None:
    halves = [{name: value[:2] for name, value in call.items()} for call in calls]
    expected = whole_run(fast, halves)
    twin = twin_of(fast)
    twin.reset()
    assert_equal(whole_run(twin, halves), expected)


def test_copies_of_a_forecasting_model_give_the_same_run(
    fast_forecast: OptimizedModel, calls: Calls
) -> None:
    fast_forecast.reset()
    expected = whole_run(fast_forecast, calls)
    for again in (copy.deepcopy(fast_forecast), pickle.loads(pickle.dumps(fast_forecast))):
        assert_equal(whole_run(again, calls), expected)


def test_sampler_runs_it_in_place_of_the_model(fast: OptimizedModel, dit: FashionDiT) -> None:
    image, again, plain = sample_dit(fast), sample_dit(fast), sample_dit(dit)
    assert torch.equal(image, again)
    assert not torch.equal(image, plain)
    # Rank 4 of 32 and two reused steps of six: near the original, not equal.
    torch.testing.assert_close(image, plain, rtol=0, atol=0.3 * float(plain.abs().max()))


# --- forecasts and mixed outputs --------------------------------------------------------------


@pytest.fixture(scope="module")
def fast_forecast(dit: FashionDiT, forecast_plan: Plan) -> OptimizedModel:
    return optimize(dit, forecast_plan)


def test_runs_one_after_another_are_equal(fast_forecast: OptimizedModel, calls: Calls) -> None:
    fast_forecast.reset()
    first = whole_run(fast_forecast, calls)
    (call,) = fast_forecast.state.calls
    assert max(map(len, call.kept.values())) == 3
    for _ in range(2):
        assert_equal(whole_run(fast_forecast, calls), first)


@pytest.mark.parametrize("broken_off", [1, 3, 5])
def test_history_of_a_run_broken_off_is_forgotten(
    fast_forecast: OptimizedModel, calls: Calls, broken_off: int
) -> None:
    fast_forecast.reset()
    expected = whole_run(fast_forecast, calls)
    other = [{**call, "hidden_states": -call["hidden_states"]} for call in calls]
    whole_run(fast_forecast, other[:broken_off])
    assert_equal(whole_run(fast_forecast, calls), expected)


def test_reset_forgets_the_history(fast_forecast: OptimizedModel, calls: Calls) -> None:
    whole_run(fast_forecast, calls)
    fast_forecast.reset()
    assert (fast_forecast.state.calls, fast_forecast.step) == ([], 0)


def test_fitted_outputs_bring_the_sampler_nearer(
    fast_forecast: OptimizedModel, dit: FashionDiT, forecast_plan: Plan
) -> None:
    unfitted = optimize(dit, forecast_plan.with_rank(4))
    assert unfitted.plan.recipe.output_weights is None
    plain = sample_dit(dit)
    errors = [relative(sample_dit(model), plain) for model in (fast_forecast, unfitted)]
    # The recorded run itself: the fit can only lower the distance at each of its steps.
    assert errors[0] < errors[1]


def test_forecast_survives_a_sampler_that_writes_in_place(
    fast_forecast: OptimizedModel, calls: Calls
) -> None:
    fast_forecast.reset()
    expected = whole_run(fast_forecast, calls)
    fast_forecast.reset()
    got = []
    for call in calls:
        output = fast_forecast(**{name: value.clone() for name, value in call.items()})
        got.append(output.clone())
        output.zero_()
    assert_equal(got, expected)


@pytest.mark.parametrize("order", [0, 2])
def test_plain_forecast_survives_a_sampler_that_writes_in_place(order: int) -> None:
    model = shake(Residual())
    with record(model) as recording:
        for _ in range(3):
            model(torch.randn(2, 5, 64))
    schedule = (REFRESH, REUSE, FORECAST)
    plan = Plan.from_trajectory(
        model, recording, rank=4, schedule=schedule, order=order, correct=False
    )
    fast = optimize(model, plan)
    inputs = torch.randn(3, 2, 5, 64)
    expected = [value.clone() for x in inputs for value in fast(x)]
    got = []
    for x in inputs:
        for value in fast(x):
            got.append(value.clone())
            value.zero_()
    assert_equal(got, expected)


# --- calls that the plan does not cover -------------------------------------------------------


LATENTS, LABELS = r"float32 \(4, 1, 28, 28\)", r"int64 \(4,\)"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("hidden_states", torch.zeros(2, 1, 28, 28), rf"{LATENTS}, got float32 \(2, 1, 28, 28\)"),
        ("hidden_states", torch.zeros(4, 1, 32, 28), rf"{LATENTS}, got float32 \(4, 1, 32, 28\)"),
        ("hidden_states", torch.zeros(4, 1, 28, 28).double(), rf"{LATENTS}, got float64"),
        ("timestep", torch.zeros(4).int(), rf"{LABELS}, got int32 \(4,\)"),
        ("timestep", torch.tensor(3), rf"{LABELS}, got int64 \(\)"),
        ("class_labels", None, rf"a tensor {LABELS}, got None"),
        ("class_labels", 3, rf"a tensor {LABELS}, got 3"),
    ],
)
def test_other_argument_is_refused(
    fast: OptimizedModel, calls: Calls, name: str, value: object, said: str
) -> None:
    with pytest.raises(RunError, match=said) as raised:
        fast(**{**calls[0], name: value})
    assert raised.value.where == f"argument {name}"
    assert "record and plan again" in raised.value.fix
    assert fast.step == 0


def test_argument_that_was_not_recorded_is_refused(
    fast_diffusers: OptimizedModel, diffusers_recording: Recording
) -> None:
    fast_diffusers.reset()
    call = diffusers_recording.calls[0]
    for options, where in (
        ({"cross_attention_kwargs": {"mask": torch.ones(4)}}, "cross_attention_kwargs.mask"),
        ({"class_labels": None}, "class_labels"),
    ):
        with pytest.raises(RunError) as raised:
            fast_diffusers(**{**call, **options})
        assert where in raised.value.where
    assert fast_diffusers.step == 0


def test_argument_that_the_model_does_not_have_is_its_own_error(
    fast: OptimizedModel, calls: Calls
) -> None:
    with pytest.raises(TypeError, match="guidance"):
        fast(**calls[0], guidance=3.0)
    with pytest.raises(TypeError, match="class_labels"):
        fast(calls[0]["hidden_states"], calls[0]["timestep"])
