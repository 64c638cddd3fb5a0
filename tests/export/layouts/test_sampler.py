"""The `sampler` layout: a whole denoising run in one ONNX model, against eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusion import GuidedDDIM
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import sample_dpm
from onnx import numpy_helper
from support.artifacts import graphs
from support.models import STEPS, relative, sample_dit
from torch import Tensor, nn

from calicache.export import SamplerTables, Session, export_onnx, read_sampler
from calicache.export.artifact.weights import SMALL
from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.common.errors import ExportError, RunError

pytestmark = pytest.mark.slow

R, C, U, FORECAST = StepMode
GUIDANCE, NULL = 1.5, 10
# Relative L2 of the final latents. float32 (6e-8) in another order over the steps of a run, and
# tables fitted to a float32 recording, give about 2e-7; a wrong variant, anchor or coefficient is
# off by 1e-3 and more.
SAME = 1e-5

Denoise = Callable[[Callable[..., Any], Tensor], Tensor]
Exported = tuple[OptimizedModel, Path]


class Residual(nn.Module):
    """One residual branch over (rows, 5, 8) tokens, with a class label."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 8)
        self.label, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        h = self.enter(hidden_states) + self.label(class_labels)[:, None]
        h = h + timestep[:, None, None] / 1000
        return self.leave(h + self.fc2(F.gelu(self.fc1(self.norm(h)))))


class NoiseArgument(Residual):
    def forward(self, noise: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(noise, timestep, class_labels)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ddim(steps: int, guidance: float = GUIDANCE) -> Denoise:
    """The sample's own, guided."""
    return lambda model, x: GuidedDDIM(steps, guidance, NULL).sample(model, x, torch.tensor([1, 2]))


def flow(steps: int, name: str = "hidden_states", dtype: torch.dtype = torch.float32) -> Denoise:
    """Flow matching in float32, without guidance; the model may have another dtype."""

    def denoise(model: Callable[..., Any], x: Tensor) -> Tensor:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        scheduler.set_timesteps(steps)
        labels = torch.tensor([1, 2])
        with torch.no_grad():
            for now in scheduler.timesteps:
                inputs = {name: x.to(dtype), "timestep": now.expand(2).to(dtype)}
                output = model(**inputs, class_labels=labels)
                x = scheduler.step(output.float(), now, x).prev_sample
        return x

    return denoise


def dpm(steps: int) -> Denoise:
    """DPM-Solver++ 2M, guided."""
    return lambda model, x: sample_dpm(model, x, torch.tensor([1, 2]), steps)


def euler(model: Callable[..., Any], x: Tensor) -> Tensor:
    """Euler over 5 steps, whose model input is the latent times a scale of the step."""
    scheduler, labels = euler_scheduler(), torch.tensor([1, 2])
    with torch.no_grad():
        for now in scheduler.timesteps:
            latent = scheduler.scale_model_input(x, now)
            output = model(hidden_states=latent, timestep=now.expand(2), class_labels=labels)
            x = scheduler.step(output, now, x).prev_sample
    return x


def euler_scheduler() -> EulerDiscreteScheduler:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    return scheduler


def ddim_of_diffusers(model: Callable[..., Any], x: Tensor) -> Tensor:
    """A guided run over a model with learned variance, whose channels come after."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(4)
    labels = torch.tensor([1, 2, NULL, NULL])
    with torch.no_grad():
        for now in scheduler.timesteps:
            rows = torch.cat([x, x])
            output = model(rows, timestep=now.expand(4), class_labels=labels).sample
            conditional, unconditional = output[:, :4].chunk(2)
            e = unconditional + GUIDANCE * (conditional - unconditional)
            x = scheduler.step(e, now, x).prev_sample
    return x


def recorded(model: nn.Module, denoise: Denoise, noise: Tensor) -> Recording:
    with record(model) as recording:
        recording.finish(denoise(model, noise))
    return recording


def compiled(
    model: nn.Module, recording: Recording, schedule: Sequence[StepMode], **options: Any
) -> tuple[OptimizedModel, SamplerTables]:
    plan = Plan.from_trajectory(
        model, recording, schedule=schedule, **{"rank": 3, "correct": False, **options}
    )
    fast = optimize(model, plan)
    return fast, read_sampler(fast, recording)


def small_sampler(
    denoise: Denoise,
    schedule: Sequence[StepMode],
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[OptimizedModel, SamplerTables]:
    torch.manual_seed(0)
    model = Residual().eval().requires_grad_(False).to(dtype)
    recording = recorded(model, denoise, draw(1, 2, 5, 8))
    return compiled(model, recording, schedule, **options)


def export_small(
    folder: Path, denoise: Denoise, schedule: Sequence[StepMode], **options: Any
) -> Exported:
    fast, sampler = small_sampler(denoise, schedule, **options)
    export_onnx(fast, folder, layout="sampler", sampler=sampler)
    return fast, folder


def assert_runs_agree(
    exported: Exported, denoise: Denoise, noise: Tensor, labels: Sequence[int], **options: Any
) -> None:
    """As `assert_same_run`, and far enough from the plain model for its bound to tell."""
    fast, _ = exported
    expected = assert_same_run(exported, denoise, noise, labels, **options)
    if set(fast.plan.schedule) != {R}:
        assert relative(denoise(fast.original, noise), expected) > 10 * SAME


def assert_same_run(
    exported: Exported, denoise: Denoise, noise: Tensor, labels: Sequence[int], **options: Any
) -> Tensor:
    """One call of `sample` against the eager optimised model step by step, which is returned."""
    fast, folder = exported
    fast.reset()
    expected = denoise(fast, noise)
    got = Session(folder).sample(noise, class_labels=torch.tensor(labels), **options)
    assert (got.shape, got.dtype) == (tuple(noise.shape), np.float32)
    assert relative(torch.from_numpy(got), expected) < SAME
    return expected


def loops(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for inside in graphs(graph) for node in inside.node if node.op_type == "Loop"]


def body(loop: onnx.NodeProto) -> onnx.GraphProto:
    return next(attribute.g for attribute in loop.attribute if attribute.name == "body")


def identities(graph: onnx.GraphProto) -> list[str]:
    return [node.name for node in graph.node if node.op_type == "Identity"]


@pytest.fixture(scope="module")
def finished(dit) -> Recording:
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    return recording


@pytest.fixture(scope="module")
def small() -> tuple[OptimizedModel, SamplerTables]:
    """Without guidance; nothing depends on the modes where it is used."""
    return small_sampler(flow(4), (R,) * 4)


@pytest.fixture(scope="module")
def exports(dit, dit_plan, forecast_plan, finished, tmp_path_factory) -> dict[str, Exported]:
    """The paper's method (R C C R C C, order 0), and all modes at order 2 with output weights."""
    root, artifacts = tmp_path_factory.mktemp("sampler"), {}
    for name, plan in (("paper", dit_plan), ("forecast", forecast_plan)):
        fast = optimize(dit, plan)
        export_onnx(fast, root / name, layout="sampler", sampler=read_sampler(fast, finished))
        artifacts[name] = (fast, root / name)
    return artifacts


@pytest.fixture(scope="module")
def session(exports) -> Session:
    return Session(exports["paper"][1])


@pytest.fixture(scope="module")
def models(exports) -> dict[str, onnx.ModelProto]:
    return {name: onnx.load(folder / "model.onnx") for name, (_, folder) in exports.items()}


# --- agreement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 5])  # 5 was not recorded
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("name", ["paper", "forecast"])
def test_whole_run_of_the_sample_agrees_with_eager(
    name: str, guidance: float | None, seed: int, exports
) -> None:
    denoise = ddim(STEPS, guidance or GUIDANCE)
    noise = draw(seed, 2, 1, 28, 28)
    labels = [1, 2, NULL, NULL]
    assert_runs_agree(exports[name], denoise, noise, labels, guidance_scale=guidance)


def test_labels_act(session) -> None:
    noise = draw(1, 2, 1, 28, 28)
    first, second = (
        session.sample(noise, class_labels=torch.tensor([k, 2, NULL, NULL])) for k in (1, 3)
    )
    assert not np.array_equal(first[0], second[0])
    # The second image has the same label and noise: bit by bit, rows are independent.
    assert np.array_equal(first[1], second[1])


def test_runs_one_after_another_are_equal(exports) -> None:
    session = Session(exports["forecast"][1])
    call = {"noise": draw(2, 2, 1, 28, 28), "class_labels": torch.tensor([1, 2, NULL, NULL])}
    first = session.sample(**call)
    session.sample(**call | {"noise": torch.full((2, 1, 28, 28), torch.inf)})
    # Bit by bit: nothing is left of a run, not even infinities.
    assert np.array_equal(session.sample(**call), first)


def test_model_without_guidance_agrees_with_eager(tmp_path: Path) -> None:
    schedule = (R, R, C, FORECAST, R, U, R, C)
    exported = export_small(tmp_path / "d", flow(8), schedule, order=2)
    assert Session(tmp_path / "d").manifest.sampler.parts == 1
    assert_runs_agree(exported, flow(8), draw(3, 2, 5, 8), [1, 2])


def test_half_precision_model_runs_inside_a_float32_sampler(tmp_path: Path) -> None:
    half = torch.float16
    fast, folder = export_small(
        tmp_path / "d", flow(4, dtype=half), (R, C, R, FORECAST), order=1, dtype=half
    )
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    noise = draw(3, 2, 5, 8)
    fast.reset()
    got = Session(folder).sample(noise, class_labels=torch.tensor([1, 2]))
    # float16 rounds at 5e-4 a value; steps of 1/4 of each output keep less than one of those.
    assert got.dtype == np.float32
    assert relative(torch.from_numpy(got), flow(4, dtype=half)(fast, noise)) < 5e-4
    # Latents that were rounded to float16 themselves would be seen.
    assert not np.array_equal(got, got.astype(np.float16))


def test_two_step_solver_agrees_with_eager(tmp_path: Path) -> None:
    exported = export_small(tmp_path / "d", dpm(7), (R, U, U, R, R, U, FORECAST), order=1)
    assert_runs_agree(exported, dpm(7), draw(3, 2, 5, 8), [1, 2, NULL, NULL])
    model = onnx.load(tmp_path / "d" / "model.onnx")
    # Count, condition, x, and what it looks back at: x and e before.
    assert [len(loop.input) for loop in loops(model.graph)][1] == 5


def test_sampler_that_scales_the_models_input_agrees_with_eager(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Residual().eval().requires_grad_(False)
    start = euler_scheduler().init_noise_sigma
    recording = recorded(model, euler, start * draw(1, 2, 5, 8))
    plan = Plan.from_trajectory(
        model, recording, schedule=(R, U, R, FORECAST, U), rank=3, order=0, correct=False
    )
    fast = optimize(model, plan)
    sampler = read_sampler(fast, recording, euler_scheduler())
    assert len(set(sampler.scales)) == 5
    export_onnx(fast, tmp_path / "d", layout="sampler", sampler=sampler)
    assert_runs_agree((fast, tmp_path / "d"), euler, start * draw(3, 2, 5, 8), [1, 2])


def test_model_with_learned_variance_agrees_with_eager(diffusers_dit, tmp_path: Path) -> None:
    recording = recorded(diffusers_dit, ddim_of_diffusers, draw(1, 2, 4, 8, 8))
    fast, sampler = compiled(diffusers_dit, recording, (R, FORECAST, R, FORECAST))
    export_onnx(fast, tmp_path / "d", layout="sampler", sampler=sampler)
    labels = [1, 2, NULL, NULL]
    assert_runs_agree((fast, tmp_path / "d"), ddim_of_diffusers, draw(3, 2, 4, 8, 8), labels)


@settings(max_examples=3, deadline=None)
@given(
    schedule=st.lists(st.sampled_from(StepMode), min_size=3, max_size=8).map(lambda s: (R, *s)),
    order=st.sampled_from([0, 1, 2]),
    correct=st.booleans(),
    seed=st.integers(2, 99),
)
def test_any_schedule_and_order_agrees_with_eager(
    tmp_path_factory, schedule: tuple[StepMode, ...], order: int, correct: bool, seed: int
) -> None:
    folder, denoise = tmp_path_factory.mktemp("any") / "d", ddim(len(schedule))
    exported = export_small(folder, denoise, schedule, order=order, correct=correct)
    noise = draw(seed, 2, 5, 8)
    with exported[0].start_run() as run:
        denoise(exported[0], noise)
    # Weights fitted to random layers can make latents jump as far as another run's would be.
    assume(all(call.start == 0 for call in run.calls))
    assert_same_run(exported, denoise, noise, [1, 2, NULL, NULL])


# --- the model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "forecast"])
def test_full_check_accepts_two_nested_loops(name: str, exports, models) -> None:
    onnx.checker.check_model(exports[name][1] / "model.onnx", full_check=True)
    graph = models[name].graph
    assert len(loops(graph)) == 2
    (outer,) = (node for node in graph.node if node.op_type == "Loop")
    assert len([node for node in body(outer).node if node.op_type == "Loop"]) == 1
    inputs = ["noise", "class_labels", "guidance_scale"]
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == ["latents"]


def test_caches_stay_in_place_at_order_zero(models) -> None:
    outer, inner = loops(models["paper"].graph)
    # Count, condition and x; the condition and x come back: no cache travels.
    for loop in (outer, inner):
        assert (len(loop.input), len(loop.output), len(body(loop).output)) == (3, 1, 2)
        # No value is copied but the condition.
        assert [name.rpartition("/")[2] for name in identities(body(loop))] == ["going_on"]


def test_only_older_refreshes_travel_between_segments(exports, models) -> None:
    fast, _ = exports["forecast"]
    outer, inner = loops(models["forecast"].graph)
    # x, and the kept outputs, which CALIBRATE steps add to.
    assert len(inner.input) - 2 == 1 + fast.compiled.variant_set.history
    caches = len(fast.compiled.variant_set.caches)
    # x, and at most the `history` refreshes before; the newest is read where it was made.
    assert caches * (fast.compiled.variant_set.history - 1) <= len(outer.input) - 3
    assert len(outer.input) - 3 <= caches * fast.compiled.variant_set.history
    assert len(body(outer).output) == len(outer.input) - 1


@pytest.mark.parametrize("name", ["paper", "forecast"])
def test_every_weight_is_stored_once(name: str, exports, models) -> None:
    fast, _ = exports[name]
    inside = [tensor for graph in [*graphs(models[name].graph)][1:] for tensor in graph.initializer]
    assert inside  # indices and the like lie where they are used
    assert all(numpy_helper.to_array(tensor).nbytes <= SMALL for tensor in inside)
    arrays = [numpy_helper.to_array(tensor) for tensor in models[name].graph.initializer]
    contents = [(a.dtype.str, a.shape, a.tobytes()) for a in arrays]
    assert len(set(contents)) == len(contents)
    for module in fast.original.modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.numpy()
            assert (
                sum(np.array_equal(a, weight) or np.array_equal(a, weight.T) for a in arrays) == 1
            )


def test_weights_take_no_more_room_than_in_the_step_layout(exports, tmp_path) -> None:
    fast, folder = exports["paper"]
    export_onnx(fast, tmp_path / "step")
    size, step_size = ((d / "weights.bin").stat().st_size for d in (folder, tmp_path / "step"))
    # 5 %: the sampler's tables, and small values that are stored in one file or the other.
    assert 0.95 * step_size < size < 1.05 * step_size


# --- what is refused ---------------------------------------------------------------------------

CALL: dict[str, Any] = {
    "noise": np.zeros((2, 1, 28, 28), np.float32),
    "class_labels": np.array([1, 2, NULL, NULL]),
}
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "guided noise": ("noise", {"noise": np.zeros((4, 1, 28, 28), np.float32)}),
    "dtype of noise": ("noise", {"noise": np.zeros((2, 1, 28, 28))}),
    "half the labels": ("class_labels", {"class_labels": np.array([1, 2])}),
    "dtype of labels": ("class_labels", {"class_labels": np.zeros(4, np.int32)}),
    "a table": ("timestep", {"timestep": np.zeros(4, np.int64)}),
    "the latent's name": ("hidden_states", {"hidden_states": np.zeros((4, 1, 28, 28))}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case: str, session) -> None:
    name, change = WRONG[case]
    with pytest.raises(RunError, match=f"input {name}: expected "):
        session.sample(**CALL | change)


def test_guidance_parts_are_told_with_their_order(session) -> None:
    with pytest.raises(RunError) as refused:
        session.sample(CALL["noise"], class_labels=np.array([1, 2]))
    assert refused.value.expected == (
        "int64 (4,): 2 guidance parts along the batch, in the recorded order, the conditional "
        "one first"
    )
    with pytest.raises(RunError, match=r"input noise: expected float32 \(2, 1, 28, 28\), got"):
        session.sample(np.zeros((4, 1, 28, 28), np.float32), class_labels=CALL["class_labels"])


def test_missing_input_is_named(session) -> None:
    with pytest.raises(RunError, match=r"input class_labels: expected .*, got nothing"):
        session.sample(CALL["noise"])


@pytest.mark.parametrize("scale", ["7.5", [7.5, 1.0], True, torch.ones(2)])
def test_guidance_that_is_no_number_is_refused(scale: Any, session) -> None:
    with pytest.raises(RunError, match="guidance_scale: expected a number, got"):
        session.sample(**CALL, guidance_scale=scale)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_guidance_that_is_not_finite_is_refused(scale: float, session) -> None:
    with pytest.raises(RunError, match=f"guidance_scale: expected a finite number, got {scale}"):
        session.sample(**CALL, guidance_scale=scale)


def test_step_of_a_sampler_artifact_is_refused(session) -> None:
    with pytest.raises(RunError, match=r"layout step or pair, got layout sampler.*sample\(\)"):
        session.step(0, **CALL)


@pytest.mark.parametrize("layout", ["step", "pair"])
def test_sample_of_another_layout_is_refused(layout: str, small, tmp_path: Path) -> None:
    export_onnx(small[0], tmp_path / "d", layout=layout)
    with pytest.raises(RunError, match=f"layout sampler, got layout {layout}.*layout='sampler'"):
        Session(tmp_path / "d").sample(draw(1, 2, 5, 8), class_labels=torch.tensor([1, 2]))


def test_guidance_scale_of_a_sampler_without_one_is_refused(small, tmp_path: Path) -> None:
    fast, sampler = small
    export_onnx(fast, tmp_path / "d", layout="sampler", sampler=sampler)
    inputs = {"noise": draw(1, 2, 5, 8), "class_labels": torch.tensor([1, 2])}
    session = Session(tmp_path / "d")
    with pytest.raises(RunError, match="input guidance_scale: expected no scale"):
        session.sample(guidance_scale=2.0, **inputs)
    assert session.sample(**inputs).shape == (2, 5, 8)


def test_model_argument_with_a_name_of_the_layout_is_refused(tmp_path: Path) -> None:
    model = NoiseArgument().eval().requires_grad_(False)
    denoise = flow(4, "noise")
    recording = recorded(model, denoise, draw(1, 2, 5, 8))
    fast, sampler = compiled(model, recording, (R,) * 4)
    with pytest.raises(ExportError, match="input noise: expected a name that the layout does not"):
        export_onnx(fast, tmp_path / "d", layout="sampler", sampler=sampler)
    assert not (tmp_path / "d").exists()


def test_sampler_of_the_plan_is_taken_where_none_is_passed(tmp_path: Path) -> None:
    model = Residual().eval().requires_grad_(False)
    recording = recorded(model, flow(4), draw(1, 2, 5, 8))
    fast, sampler = compiled(model, recording, (R, C, R, C), correct=True)
    own = export_onnx(fast, tmp_path / "own", layout="sampler")
    # The same calls of the model and the same fits: the same bytes, which the manifest hashes.
    assert own == export_onnx(fast, tmp_path / "passed", layout="sampler", sampler=sampler)


def test_layout_and_sampler_belong_together(small, tmp_path: Path) -> None:
    fast, sampler = small
    with pytest.raises(ExportError, match=r"expected a plan that knows its sampler, got .*read_s"):
        export_onnx(fast, tmp_path / "d", layout="sampler")
    for layout in ("step", "pair"):
        with pytest.raises(ExportError, match=f"expected none for the layout {layout}, got one"):
            export_onnx(fast, tmp_path / "d", layout=layout, sampler=sampler)
    with pytest.raises(ExportError, match=r"layout: expected step \| pair \| sampler, got 'x'"):
        export_onnx(fast, tmp_path / "d", layout="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [3, 5])
def test_sampler_of_another_length_is_refused(steps: int, small, tmp_path: Path) -> None:
    fast, _ = small
    _, other = small_sampler(flow(steps), (R,) * steps)
    with pytest.raises(ExportError, match=rf"sampler: expected .*4 steps.*got {steps}"):
        export_onnx(fast, tmp_path / "d", layout="sampler", sampler=other)


def test_a_run_is_exported_for_another_batch_than_the_recorded_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Residual().eval().requires_grad_(False)
    sampler = GuidedDDIM(6, GUIDANCE, NULL)
    with record(model) as recording:
        recording.finish(sampler.sample(model, draw(0, 2, 5, 8), torch.tensor([1, 2])))
    fast = optimize(model, Plan.from_trajectory(model, recording, schedule=2, rank=4))
    noise, labels = draw(1, 3, 5, 8), torch.tensor([4, 5, 6])
    both = torch.cat([labels, torch.full((3,), NULL)])
    other = fast.for_call(
        hidden_states=torch.cat([noise, noise]),
        timestep=torch.full((6,), 999),
        class_labels=both,
    )
    export_onnx(other, tmp_path / "run", layout="sampler")
    actual = torch.from_numpy(Session(tmp_path / "run").sample(noise, class_labels=both))
    assert relative(actual, sampler.sample(fast, noise, labels)) < SAME


def test_tables_that_differ_from_row_to_row_fit_no_other_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Residual().eval().requires_grad_(False)
    with record(model) as recording:
        recording.finish(ddim(6)(model, draw(0, 2, 5, 8)))
    plan = Plan.from_trajectory(model, recording, schedule=2, rank=4)
    assert plan.sampler is not None
    steps = plan.sampler.inputs["timestep"]
    uneven = replace(plan.sampler, inputs={"timestep": steps + torch.arange(4)})
    other = optimize(model, plan).for_call(
        hidden_states=draw(1, 6, 5, 8),
        timestep=torch.full((6,), 999),
        class_labels=torch.tensor([4, 5, 6, NULL, NULL, NULL]),
    )
    with pytest.raises(ExportError, match=r"timestep of the sizes \[6\].*got \[4\], not the same"):
        export_onnx(other, tmp_path / "run", layout="sampler", sampler=uneven)
