"""What a model's code reads off tensors: recorded, answered in tracing, fixed at run time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calicache.export import Session, export_onnx, read_sampler
from calicache.graph_passes import OptimizedModel, Plan, Recording, StepMode, optimize, record
from calicache.graph_passes.common.disk.hashing import digest
from calicache.graph_passes.common.errors import CaptureError, RunError
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.recording.reads import answering, check_fixed, find_reads

ROWS, TOKENS, WIDTH = 2, 4, 8
TIMES = (900.0, 500.0, 100.0)
Reading = Callable[[Any, Tensor, Tensor], Any]

# Rows of 3 and 1 tokens; the same lengths elsewhere; rows of 2 and 2.
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
MOVED = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]).bool()
OTHER = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool()

# The graph calls the same kernels on the same numbers; shapes may pick another GEMM: a few ulp.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


class Reader(nn.Module):
    """One residual branch; then `path` reads something off its arguments."""

    def __init__(self, path: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.fc = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.path = path

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Any:
        x = x + self.inner(torch.tanh(x * timestep[:, None, None] / 1000))
        return self.path(self, x, mask)


class Packed(nn.Module):
    """The tokens that a mask leaves, packed as rows; two residual branches on them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(WIDTH, WIDTH), nn.Linear(1, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.fc3 = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embed(x) + self.time(timestep[:, None] / 1000)[:, None]
        rows = hidden[mask]
        rows = rows + self.fc2(F.gelu(self.fc1(rows)))
        rows = rows + self.fc3(torch.tanh(rows))
        result = torch.zeros_like(hidden)
        result[mask] = rows
        return result


def run_of(model: nn.Module, mask: Tensor = MASK, seed: int = 1, times: Any = TIMES) -> Tensor:
    """A sampler's run; the model gives back what it takes."""
    x = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for now in times:
            output = model(x=x, timestep=torch.full((ROWS,), now), mask=mask)
            x = 0.9 * x - 0.1 * output
    return x


def recorded(model: nn.Module, *masks: Tensor) -> Recording:
    """One run with every mask."""
    with record(model) as recording:
        for seed, mask in enumerate(masks or (MASK,)):
            recording.finish(run_of(model, mask, seed))
    return recording


def watched(model: nn.Module, calls: int = 3) -> Recording:
    """The calls of one run, for a model that gives back any shape."""
    with record(model) as recording, torch.no_grad():
        for now in TIMES[:calls]:
            model(torch.randn(ROWS, TOKENS, WIDTH), torch.full((ROWS,), now), MASK)
    return recording


def planned(model: nn.Module, recording: Recording, **options: Any) -> Plan:
    settings = {"rank": WIDTH, "order": 0, "correct": False, **options}
    return Plan.from_trajectory(model, recording, **settings)


# --- every way to read --------------------------------------------------------------------------


def rows_of_lengths(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(1).tolist()
    rows = [m.fc(row[:n]) for row, n in zip(x, lengths, strict=True)]
    return torch.stack([F.pad(row, (0, 0, 0, TOKENS - len(row))) for row in rows])


def set_at_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = x.clone()
    y[mask] = m.fc(x)[mask]
    return y


def zero_at_mask(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    y = m.fc(x)
    y[~mask] = 0.0
    return y


WHERE = [[0, 0, 0, 1], [0, 1, 2, 0]]
READS: dict[str, tuple[Reading, list[Any]]] = {
    "tolist": (rows_of_lengths, [[3, 1]]),
    "item": (lambda m, x, mask: m.fc(x[:, : mask.sum(1).max().item()]), [3]),
    "bool": (lambda m, x, mask: m.fc(x) if mask.all() else x, [False]),
    "not": (lambda m, x, mask: m.fc(x) if not torch.all(mask) else x, [False]),
    "int": (lambda m, x, mask: m.fc(x) * int(mask.sum()), [4]),
    "float": (lambda m, x, mask: m.fc(x) * float(mask.float().mean()), [0.5]),
    "index": (lambda m, x, mask: sum(m.fc(x[:, k]) for k in range(mask.sum(1).max())), [3]),
    "place in a list": (lambda m, x, mask: [x, m.fc(x)][mask.sum(1)[1]], [1]),
    "iteration": (lambda m, x, mask: m.fc(x) * sum(int(n) for n in mask.sum(1)), [3, 1]),
    "end of a slice": (lambda m, x, mask: m.fc(x[:, : mask.sum(1).max()]), [3]),
    "start and end": (lambda m, x, mask: m.fc(x[:, mask[1].sum() : mask[0].sum()]), [1, 3]),
    "mask": (lambda m, x, mask: m.fc(x[mask]), [WHERE]),
    "mask and slice": (lambda m, x, mask: m.fc(x)[mask, 2:], [WHERE]),
    "mask in the second place": (lambda m, x, mask: m.fc(x)[:, mask[0]], [[[0, 1, 2]]]),
    "values set at a mask": (set_at_mask, [WHERE, WHERE]),
    "a number set at a mask": (zero_at_mask, [[[0, 1, 1, 1], [3, 1, 2, 3]]]),
    "nonzero": (
        lambda m, x, mask: m.fc(x).flatten(0, 1)[mask.flatten().nonzero()[:, 0]],
        [[[0, 1, 2, 4]]],
    ),
    "nonzero of torch": (lambda m, x, mask: m.fc(x)[torch.nonzero(mask)[:, 0]], [WHERE]),
    "nonzero as a tuple": (lambda m, x, mask: m.fc(x)[mask.nonzero(as_tuple=True)], [WHERE]),
    "repeat_interleave": (
        lambda m, x, mask: m.fc(x).repeat_interleave(mask.sum(1), dim=0),
        [[3, 1]],
    ),
    "repeat_interleave of torch": (
        lambda m, x, mask: torch.repeat_interleave(m.fc(x), mask.sum(0), dim=-2),
        [[2, 1, 1, 0]],
    ),
    "repeat_interleave, all flat": (
        lambda m, x, mask: m.fc(x)[:, :2, :2].repeat_interleave(mask.flatten().long()),
        [[1, 1, 1, 0, 1, 0, 0, 0]],
    ),
    "repeat_interleave by one count": (
        lambda m, x, mask: m.fc(x).repeat_interleave(mask.sum()[None], dim=1),
        [[4]],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", READS)
def test_the_graph_equals_the_model_on_recorded_and_on_other_latents(way: str) -> None:
    path, answers = READS[way]
    model = Reader(path).eval()
    recording = watched(model)
    reads = find_reads(model, recording)
    assert json.loads(reads) == answers
    captured = capture(model, recording.signature, reads)
    assert captured.fixed == ("mask",)
    others = {"x": torch.randn(ROWS, TOKENS, WIDTH), "timestep": torch.tensor([3.0, 7.0])}
    for call in (*recording.calls, {**recording.calls[0], **others}):
        torch.testing.assert_close(captured.module(*call.values())[0], model(**call), **CLOSE)


def test_a_mask_of_one_boolean_adds_a_dimension_as_in_torch() -> None:
    model = Reader(lambda m, x, mask: m.fc(x)[mask.any()]).eval()
    recording = watched(model)
    captured = capture(model, recording.signature, find_reads(model, recording))
    call = recording.calls[0]
    torch.testing.assert_close(captured.module(*call.values())[0], model(**call), **CLOSE)


def test_numpy_of_an_argument_is_read() -> None:
    model = Reader(lambda m, x, mask: m.fc(x) * int(mask.numpy().sum())).eval()
    recording = watched(model)
    captured = capture(model, recording.signature, find_reads(model, recording))
    assert captured.fixed == ("mask",)
    call = recording.calls[0]
    torch.testing.assert_close(captured.module(*call.values())[0], model(**call), **CLOSE)


def test_repeats_by_keyword_alone_are_read() -> None:
    def path(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.fc(x)[torch.repeat_interleave(repeats=mask.sum(1))]

    model = Reader(path).eval()
    recording = watched(model)
    captured = capture(model, recording.signature, find_reads(model, recording))
    call = recording.calls[0]
    torch.testing.assert_close(captured.module(*call.values())[0], model(**call), **CLOSE)


def test_a_model_that_reads_nothing_has_no_fixed_inputs() -> None:
    model = Reader(lambda m, x, mask: m.fc(x) * mask[..., None]).eval()
    recording = watched(model)
    assert find_reads(model, recording) == "[]"
    assert capture(model, recording.signature).fixed == ()


def test_an_integer_index_and_a_slice_of_numbers_are_no_reads() -> None:
    model = Reader(lambda m, x, mask: m.fc(x)[:, mask.sum(1) - 1][:, :1]).eval()
    assert find_reads(model, watched(model)) == "[]"


def test_a_weight_that_is_read_fixes_no_input() -> None:
    model = Reader(lambda m, x, _: x if m.fc.bias.sum() > 9 else m.fc(x)).eval()
    recording = watched(model)
    reads = find_reads(model, recording)
    assert reads == "[false]"
    assert capture(model, recording.signature, reads).fixed == ()


def test_only_the_inputs_that_decide_are_fixed() -> None:
    class TwoMasks(Reader):
        def forward(self, x: Tensor, timestep: Tensor, mask: Tensor, ends: Tensor) -> Tensor:
            y = super().forward(x, timestep, mask)
            return y * mask[..., None] if ends.max() < TOKENS else y

    model = TwoMasks(lambda m, x, _: m.fc(x)).eval()
    with record(model) as recording, torch.no_grad():
        for now in TIMES:
            arguments = torch.randn(ROWS, TOKENS, WIDTH), torch.full((ROWS,), now), MASK
            model(*arguments, torch.tensor([3, 1]))
    captured = capture(model, recording.signature, find_reads(model, recording))
    assert captured.fixed == ("ends",)


def test_reads_of_a_half_precision_value_come_back_to_the_last_bit() -> None:
    class Scaled(Reader):
        def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
            scale = (mask.to(torch.bfloat16).mean() / 3).item()
            return super().forward(x, timestep, mask) * scale

    model = Scaled(lambda m, x, _: m.fc(x)).eval()
    (scale,) = json.loads(find_reads(model, watched(model)))
    # JSON keeps every digit of a float64, which holds any bfloat16: bitwise.
    assert scale == (torch.tensor(0.5, dtype=torch.bfloat16) / 3).item()


# --- which calls are run, and what is left as it was ----------------------------------------------


class Counted(Reader):
    """Keeps the latent of every call."""

    def __init__(self, path: Reading) -> None:
        super().__init__(path)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Any:
        self.seen.append(x)
        return super().forward(x, timestep, mask)


def same_shape(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Reads the longest row, and gives back the latent's shape."""
    return m.fc(x) / int(mask.sum(1).max())


def test_only_the_first_call_of_every_run_and_the_last_of_one_are_run() -> None:
    model = Counted(same_shape).eval()
    recording = recorded(model, MASK, MOVED, MASK)
    model.seen.clear()
    assert find_reads(model, recording) == "[3]"
    first, second, third = recording.runs
    expected = [first[0], first[-1], second[0], third[0]]
    assert len(model.seen) == 4
    for got, call in zip(model.seen, expected, strict=True):
        assert torch.equal(got, call["x"])  # the recorded value itself


def test_a_model_that_reads_nothing_is_run_once() -> None:
    model = Counted(lambda m, x, _: m.fc(x)).eval()
    recording = recorded(model, MASK, MASK)
    model.seen.clear()
    assert find_reads(model, recording) == "[]"
    assert len(model.seen) == 1


def test_a_model_on_meta_is_not_run() -> None:
    model = Counted(same_shape).eval()
    recording = recorded(model, MASK)
    model.seen.clear()
    assert find_reads(model.to("meta"), recording) == "[]"
    assert model.seen == []


def test_a_model_with_reads_is_captured_on_meta() -> None:
    model = Reader(rows_of_lengths).eval()
    recording = watched(model)
    reads = find_reads(model, recording)
    on_meta = capture(model.to("meta"), recording.signature, reads)
    assert on_meta.fixed == ("mask",)
    (output,) = on_meta.graph.output_node().args[0]
    assert tuple(output.meta["val"].shape) == (ROWS, TOKENS, WIDTH)


@pytest.mark.slow
def test_the_model_object_is_as_it_was() -> None:
    model = Reader(same_shape).eval()
    before = dict(vars(model))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fast = optimize(model, planned(model, recorded(model, MASK)))
    assert fast.original is model
    assert "forward" not in vars(model)
    assert dict(vars(model)) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name  # not written at all


def test_the_model_reads_by_itself_again_after_capture() -> None:
    model = Reader(same_shape).eval()
    recording = recorded(model, MASK)
    capture(model, recording.signature, find_reads(model, recording))
    x, now = torch.randn(ROWS, TOKENS, WIDTH), torch.full((ROWS,), 5.0)
    # Rows of 3 and of 2 tokens: the division differs. Two roundings of float32.
    expected = model(x, now, MASK) * 3 / 2
    torch.testing.assert_close(model(x, now, OTHER), expected, rtol=1e-6, atol=1e-7)


# --- what the record must say -------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_reads() -> None:
    with answering("[3, [1, 2], true]") as seen:
        one, two = torch.zeros(()), torch.zeros(2)
        assert (one.item(), two.tolist(), bool(one)) == (3, [1, 2], True)
    assert [value is given for value, given in zip(seen, (one, two, one), strict=True)] == [
        True
    ] * 3
    assert one.item() == 0


def test_without_a_record_tensors_answer_themselves() -> None:
    with answering("[]") as seen:
        assert torch.ones(()).item() == 1
    assert seen == []


def test_one_read_more_than_recorded_is_refused() -> None:
    value = torch.zeros(())
    expected = "reads: expected the 1 values that every recorded call read, got another one"
    with answering("[3]"), pytest.raises(CaptureError, match=expected):
        value.item() + value.item()


def flips(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    return m.fc(x) if mask.sum() > 4 else x + m.fc(x)


def test_runs_whose_reads_differ_are_refused_with_the_reason() -> None:
    model = Reader(flips).eval()
    recording = recorded(model, MASK, torch.ones_like(MASK))
    assert find_reads(model, recording) == "null"
    with pytest.raises(CaptureError) as caught:
        planned(model, recording)
    message = str(caught.value)
    assert message.startswith("capture: Reader: expected a model that torch.export captures, got")
    assert "data-dependent expression" in message
    assert "A graph cannot follow sizes and branches that differ from call to call" in message


def test_sizes_that_differ_from_run_to_run_are_refused_with_the_layer() -> None:
    model = Reader(lambda m, x, mask: x + m.fc(x[mask]).sum()).eval()
    recording = recorded(model, MASK, torch.ones_like(MASK))
    assert find_reads(model, recording) == "null"
    with pytest.raises(CaptureError) as caught:
        planned(model, recording)
    message = str(caught.value)
    assert "expected shapes that the shapes of the inputs give" in message
    assert "which depends on values" in message


class Decides(Reader):
    """Adds a layer where a condition holds, which is read."""

    def __init__(self, condition: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda m, x, _: m.fc(x))
        self.condition = condition

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        y = super().forward(x, timestep, mask)
        return y if self.condition(x, timestep) else x + y


@pytest.mark.parametrize(
    ("name", "condition"),
    [
        ("x", lambda x, _: x.sum() > 1e9),  # the same answer in every call, by chance
        ("timestep", lambda _, t: t.max() < 1e9),
        # The first and the last call agree; the one between does not.
        ("timestep", lambda _, t: t.max() == TIMES[1]),
    ],
    ids=["the latent", "the timestep", "the timestep in the middle"],
)
def test_a_read_that_depends_on_what_changes_in_a_run_is_refused_with_its_name(
    name: str, condition: Callable[[Tensor, Tensor], Tensor]
) -> None:
    model = Decides(condition).eval()
    with pytest.raises(CaptureError) as caught:
        planned(model, recorded(model, MASK, MOVED))
    assert str(caught.value) == (
        f"capture: {name}: expected control flow and sizes that stay the same over a run, got "
        f"some that depend on {name}, which changes from step to step. "
        "A graph cannot follow such a decision; compute both sides, or mask."
    )


def test_a_decision_that_changes_in_a_run_is_refused_with_the_reason() -> None:
    model = Decides(lambda _, t: t.max() > TIMES[1]).eval()
    recording = recorded(model, MASK)
    assert find_reads(model, recording) == "null"
    with pytest.raises(CaptureError, match=r"data-dependent.*that differ from call to call"):
        planned(model, recording)


# --- run time -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    torch.manual_seed(0)
    return Packed().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def recording(packed: nn.Module) -> Recording:
    return recorded(packed, MASK, MASK)


@pytest.fixture(scope="module")
def plan(packed: nn.Module, recording: Recording) -> Plan:
    return planned(packed, recording)


@pytest.fixture(scope="module")
def fast(packed: nn.Module, plan: Plan) -> OptimizedModel:
    return optimize(packed, plan)


def test_the_plan_fixes_the_mask_at_its_recorded_value(plan: Plan) -> None:
    assert json.loads(plan.binding.reads) == [WHERE, WHERE]
    assert plan.binding.run_values == {"mask": (digest(MASK),)}


def test_layers_on_packed_tokens_are_calibrated(fast: OptimizedModel) -> None:
    assert StepMode.CALIBRATE in fast.plan.schedule
    assert fast.compiled.analysis.fixed == {"mask": (digest(MASK),)}
    # 3 + 1 tokens under the mask, not 2 x 4.
    sites = [(site.name, site.tokens) for site in fast.compiled.analysis.sites.linears]
    assert sites == [("fc1", 4), ("fc2", 4), ("fc3", 4)]


def test_the_recorded_mask_is_accepted_and_full_rank_is_exact(
    packed: nn.Module, fast: OptimizedModel
) -> None:
    fast.reset()
    # float32: three layers as products of two factors, over 3 steps.
    torch.testing.assert_close(
        run_of(fast, MASK.clone(), seed=8), run_of(packed, MASK, seed=8), rtol=1e-4, atol=1e-5
    )


MESSAGE = (
    "run: argument mask: expected the values that were recorded: sizes inside the model depend on "
    "them, got others. Record and plan with these values, such as masks of this prompt length."
)


@pytest.mark.parametrize("mask", [OTHER, MOVED, ~MASK])
def test_another_mask_gets_a_graph_of_its_own(
    packed: nn.Module, fast: OptimizedModel, mask: Tensor
) -> None:
    fast.reset()
    # float32: three layers as products of two factors, over 3 steps.
    torch.testing.assert_close(run_of(fast, mask), run_of(packed, mask), rtol=1e-4, atol=1e-5)
    (state,) = fast.state.calls
    assert state.compiled.analysis.fixed == {"mask": (digest(mask),)}


def test_another_batch_size_gets_a_graph_of_its_own_where_the_mask_is_fixed(
    packed: nn.Module, fast: OptimizedModel
) -> None:
    fast.reset()
    inputs = {"x": torch.randn(1, TOKENS, WIDTH), "mask": MASK[:1]}
    inputs["timestep"] = torch.full((1,), TIMES[0])
    # A REFRESH runs the model's own operations: float32 rounding.
    torch.testing.assert_close(fast(**inputs), packed(**inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "recorded_too"), [(MASK, True), (MOVED, True), (MASK.flip(0), False)]
)
def test_recorded_masks_share_a_graph(mask: Tensor, recorded_too: bool) -> None:
    model = Reader(same_shape).eval()
    fast = optimize(model, planned(model, recorded(model, MASK, MOVED)))
    assert fast.compiled.analysis.fixed == {"mask": (digest(MASK), digest(MOVED))}
    # float32: one layer as a product of two factors, over 3 steps.
    torch.testing.assert_close(run_of(fast, mask), run_of(model, mask), rtol=1e-4, atol=1e-5)
    (state,) = fast.state.calls
    assert (state.compiled is fast.compiled) is recorded_too


def test_saved_plans_keep_reads_and_fixed_values(
    packed: nn.Module, plan: Plan, fast: OptimizedModel, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert (loaded.binding, loaded.recipe) == (plan.binding, plan.recipe)
    assert loaded.binding.reads != "[]"
    fast.reset()
    # The same program on the same numbers.
    assert torch.equal(run_of(optimize(packed, loaded)), run_of(fast))


@pytest.mark.slow
def test_a_session_of_steps_takes_the_recorded_mask_alone(
    fast: OptimizedModel, tmp_path: Path
) -> None:
    export_onnx(fast, tmp_path / "step")
    session = Session(tmp_path / "step")
    assert session.manifest.fixed == {"mask": (digest(MASK),)}
    steps = iter((0, 1, 2, 0))

    def denoise(**tensors: Tensor) -> Tensor:
        return torch.from_numpy(session.step(next(steps), **tensors))

    fast.reset()
    # float32 in two runtimes, over 3 steps.
    torch.testing.assert_close(run_of(denoise), run_of(fast), rtol=1e-4, atol=1e-5)
    with pytest.raises(RunError) as caught:
        run_of(denoise, OTHER)
    assert str(caught.value) == MESSAGE


@pytest.mark.slow
def test_a_session_of_whole_runs_takes_the_recorded_mask_alone(
    fast: OptimizedModel, recording: Recording, tmp_path: Path
) -> None:
    export_onnx(fast, tmp_path / "run", layout="sampler", sampler=read_sampler(fast, recording))
    session = Session(tmp_path / "run")
    noise = torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(4))
    latents = session.sample(noise, mask=MASK)
    fast.reset()
    np.testing.assert_allclose(latents, run_of(fast, seed=4), rtol=1e-4, atol=1e-5)
    with pytest.raises(RunError) as caught:
        session.sample(noise, mask=OTHER)
    assert str(caught.value) == MESSAGE


# --- digests ------------------------------------------------------------------------------------


def test_equal_values_have_equal_digests_whatever_their_layout() -> None:
    value = torch.randn(3, 5)
    assert digest(value.T) == digest(value.T.contiguous())
    assert digest(value.requires_grad_()) == digest(value.detach().clone())


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([[1, 0, 1, 1]]).bool(),
        torch.tensor([1, 0, 1, 0]).bool(),
        torch.tensor([[1], [0], [1], [0]]).bool(),
        torch.tensor([[1, 0, 1, 0]], dtype=torch.uint8),
    ],
    ids=["value", "fewer dimensions", "shape", "dtype"],
)
def test_digests_tell_values_shapes_and_dtypes_apart(other: Tensor) -> None:
    assert digest(torch.tensor([[1, 0, 1, 0]]).bool()) != digest(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_every_dtype_has_a_digest(dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, dtype=dtype)
    assert digest(zeros) != digest(torch.ones_like(zeros))


def test_values_without_digests_are_not_looked_at() -> None:
    fixed = {"mask": (digest(MASK), digest(MOVED))}
    check_fixed(fixed, {"mask": MOVED, "x": torch.randn(3)})
    with pytest.raises(RunError, match="argument mask"):
        check_fixed(fixed, {"mask": OTHER, "x": torch.randn(3)})
