"""What depends on what: constant < run < step < latent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import diffusers_calls, sample_dit
from torch import Tensor, nn

from calicache.export import Session, export_onnx, read_sampler
from calicache.graph_passes import Plan, optimize
from calicache.graph_passes.common.errors import DependenceError
from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.graph.surgery import module_path
from calicache.graph_passes.graph.tap import Tap
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recorder import record
from calicache.graph_passes.recording.recording import Recording

CONSTANT, RUN, STEP, LATENT = Dependence


class Denoiser(nn.Module):
    """Takes what real ones take; what it computes does not matter here."""

    def forward(self, x: Tensor, timestep: Any = None, cond: Any = None) -> tuple[Any, ...]:
        return x, timestep, cond


def recorded(calls: Iterable[dict[str, Any]]) -> Recording:
    model = Denoiser()
    with record(model) as recording:
        for call in calls:
            model(**call)
    return recording


def sampled(condition: Callable[[int, int], Any], runs: int = 2) -> Recording:
    """Runs over the timesteps 9, 5, 1 with fresh noise; `condition(run, t)` is one more input."""
    return recorded(
        {"x": torch.randn(2, 3), "timestep": torch.tensor([t, t]), "cond": condition(run, t)}
        for run in range(runs)
        for t in (9, 5, 1)
    )


def graph_and_classes(
    model: nn.Module, recording: Recording
) -> tuple[CapturedGraph, dict[str, Dependence]]:
    captured = capture(model, recording.signature)
    return captured, classify_nodes(captured, recording.dependence)


def values_of(captured: CapturedGraph, call: dict[str, Tensor]) -> dict[str, Any]:
    """The value of every node."""
    values: dict[str, Any] = {}
    names = {node.name for node in captured.graph.nodes}
    Tap(captured.module, names, values.__setitem__).run(*call.values())
    return values


def changed(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    return {
        name
        for name, value in a.items()
        if isinstance(value, Tensor) and not torch.equal(value, b[name])
    }


# --- two real models --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dit_classes(
    dit: nn.Module, dit_recording: Recording
) -> tuple[CapturedGraph, dict[str, Dependence]]:
    return graph_and_classes(dit, dit_recording)


@pytest.fixture(scope="module")
def diffusers_classes(
    diffusers_dit: nn.Module, diffusers_recording: Recording
) -> tuple[CapturedGraph, dict[str, Dependence]]:
    return graph_and_classes(diffusers_dit, diffusers_recording)


def test_inputs_of_the_real_models(
    dit_recording: Recording, diffusers_recording: Recording
) -> None:
    expected = {"hidden_states": LATENT, "timestep": STEP, "class_labels": RUN}
    assert dit_recording.dependence == expected
    assert diffusers_recording.dependence == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "path", "expected"),
    [
        ("dit", "class_embed", RUN),
        ("dit", "time_embed.fc1", STEP),
        ("dit", "time_embed.fc2", STEP),
        ("dit", "blocks.1.modulation", STEP),
        ("dit", "final_modulation", STEP),
        ("dit", "patch_embed", LATENT),
        ("dit", "blocks.0.attn.q", LATENT),
        ("dit", "blocks.1.mlp.fc2", LATENT),
        ("diffusers", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table", RUN),
        ("diffusers", "transformer_blocks.1.norm1.emb.timestep_embedder.linear_2", STEP),
        ("diffusers", "transformer_blocks.1.norm1.linear", STEP),
        ("diffusers", "proj_out_1", STEP),
        ("diffusers", "pos_embed.proj", LATENT),
        ("diffusers", "transformer_blocks.0.attn1.to_q", LATENT),
        ("diffusers", "transformer_blocks.1.ff.net.2", LATENT),
    ],
)
def test_class_of_a_named_layer(
    model: str, path: str, expected: Dependence, request: pytest.FixtureRequest
) -> None:
    captured, classes = request.getfixturevalue(f"{model}_classes")
    kinds = {classes[node.name] for node in captured.graph.nodes if module_path(node) == path}
    assert kinds == {expected}


@pytest.mark.parametrize(
    ("model", "positions"), [("dit", "positions"), ("diffusers", "pos_embed_pos_embed")]
)
def test_weights_and_positions_are_constant(
    model: str, positions: str, request: pytest.FixtureRequest
) -> None:
    captured, classes = request.getfixturevalue(f"{model}_classes")
    assert classes[positions] is CONSTANT
    held = {classes[node.name] for node in captured.graph.nodes if node.op == "get_attr"}
    assert held == {CONSTANT}


def test_every_value_changes_no_more_often_than_its_class_says(
    dit: nn.Module, dit_classes: tuple[CapturedGraph, dict[str, Dependence]]
) -> None:
    captured, classes = dit_classes
    with record(dit) as recording:
        sample_dit(dit, seed=2)
        sample_dit(dit, seed=3)
    (first, later), (other, _) = (run[1:3] for run in recording.runs)
    start = values_of(captured, dict(first))
    over_steps = changed(start, values_of(captured, dict(later)))
    over_noise = changed(start, values_of(captured, dict(other)))
    assert {classes[name] for name in over_noise} == {LATENT}
    assert {classes[name] for name in over_steps} == {STEP, LATENT}


def test_labels_change_only_what_is_at_least_run(
    diffusers_classes: tuple[CapturedGraph, dict[str, Dependence]],
    diffusers_recording: Recording,
) -> None:
    captured, classes = diffusers_classes
    call = dict(diffusers_recording.calls[0])
    other = values_of(captured, call | {"class_labels": torch.tensor([3, 4, 10, 10])})
    touched = {classes[name] for name in changed(values_of(captured, call), other)}
    assert touched == {RUN, STEP, LATENT}


def test_classes_do_not_depend_on_how_many_runs_were_recorded(
    diffusers_dit: nn.Module, diffusers_recording: Recording
) -> None:
    with record(diffusers_dit) as recording:
        diffusers_calls(diffusers_dit, seed=1)
        diffusers_calls(diffusers_dit, seed=2)
    assert len(recording.runs) == 2
    assert recording.dependence == diffusers_recording.dependence


# --- inputs of other kinds --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 1)])
def test_timestep_of_any_shape_is_step(shape: tuple[int, ...]) -> None:
    recording = recorded(
        {"x": torch.randn(2, 3), "timestep": torch.full(shape, t)} for t in (0.9, 0.5, 0.1)
    )
    assert recording.dependence == {"x": LATENT, "timestep": STEP}


def test_text_that_differs_only_between_runs_is_run() -> None:
    texts = torch.randn(2, 5)
    assert sampled(lambda run, _: texts[run]).dependence["cond"] is RUN


def test_per_token_timestep_is_step_where_two_runs_show_it() -> None:
    mask = torch.tensor([0.0, 1.0, 1.0])  # the first token is given and holds no noise
    assert sampled(lambda _, t: t * mask).dependence["cond"] is STEP


def test_per_token_timestep_is_latent_where_one_run_cannot_show_it() -> None:
    mask = torch.tensor([0.0, 1.0, 1.0])
    assert sampled(lambda _, t: t * mask, runs=1).dependence["cond"] is LATENT


def test_a_second_latent_is_latent() -> None:
    assert sampled(lambda *_: torch.randn(4)).dependence["cond"] is LATENT


def test_two_runs_from_the_same_noise_leave_the_latent_latent() -> None:
    steps = [{"x": torch.randn(2, 3), "timestep": torch.tensor(t)} for t in (9, 5, 1)]
    assert recorded(steps * 2).dependence == {"x": LATENT, "timestep": STEP}


def test_an_input_that_moves_in_one_run_only_is_not_run() -> None:
    recording = sampled(lambda run, t: torch.tensor(float(t == 1 and run == 1)))
    assert recording.dependence["cond"] is STEP


@pytest.mark.parametrize(
    ("times", "calls"),
    [
        ([9, 9, 5, 5, 1, 1], 2),  # guidance by two calls
        ([9, 5, 5, 1, 1], 1),  # Heun
        ([9, 9, 5], 1),  # a warm-up step done twice
    ],
)
def test_timesteps_that_come_twice_are_step(times: list[int], calls: int) -> None:
    recording = recorded({"x": torch.randn(2, 3), "timestep": torch.tensor(t)} for t in times)
    assert recording.dependence == {"x": LATENT, "timestep": STEP}
    assert recording.calls_per_step == calls


def test_random_numbers_drawn_in_the_graph_are_not_folded() -> None:
    class Dithering(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            return x + timestep + torch.randn(3)

    model = Dithering().eval()
    with record(model) as recording:
        for t in (2, 1):
            model(torch.randn(2, 3), torch.tensor(t))
    captured, classes = graph_and_classes(model, recording)
    drawn = [n.name for n in captured.graph.nodes if n.target is torch.ops.aten.randn.default]
    assert [classes[name] for name in drawn] == [LATENT]


# --- operands that lend only their form ---------------------------------------------------------


class Forms(nn.Module):
    """One operation on a latent x, a step-known t and a text that stays."""

    def __init__(self, op: Callable[[SimpleNamespace], Tensor]) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.op(SimpleNamespace(x=x, t=timestep, text=text)), x


def formed(
    op: Callable[[SimpleNamespace], Tensor],
) -> tuple[CapturedGraph, dict[str, Dependence]]:
    model, text = Forms(op).eval(), torch.randn(2, 3)
    with record(model) as recording:
        for t in (9.0, 5.0, 1.0):
            model(torch.randn(2, 3), torch.full((2, 3), t), text)
    return graph_and_classes(model, recording)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (lambda v: v.text.type_as(v.x), RUN),
        (lambda v: v.t.type_as(v.x), STEP),
        (lambda v: v.x.type_as(v.text), LATENT),
        (lambda v: v.x.type_as(v.x), LATENT),
        (lambda v: v.text.expand_as(v.x), RUN),
        (lambda v: v.x.view_as(v.text), LATENT),
        (lambda v: v.text.reshape_as(v.x), RUN),
        (lambda v: torch.zeros_like(v.x), CONSTANT),
        (lambda v: torch.ones_like(v.x), CONSTANT),
        (lambda v: torch.full_like(v.x, 3.0), CONSTANT),
        (lambda v: v.x.new_zeros(2, 3), CONSTANT),
        (lambda v: v.x.new_ones(2, 3), CONSTANT),
        (lambda v: v.x.new_full((2, 3), 3.0), CONSTANT),
        (lambda v: torch.ones_like(v.x) * v.t, STEP),
        (lambda v: torch.zeros_like(v.x) + v.text.type_as(v.x), RUN),
        (lambda v: torch.zeros_like(v.x) + v.text.type_as(v.x) * v.x, LATENT),
        (lambda v: torch.rand_like(v.text), LATENT),
    ],
)
def test_an_operand_that_lends_its_form_does_not_count(
    op: Callable[[SimpleNamespace], Tensor], expected: Dependence
) -> None:
    captured, classes = formed(op)
    result = captured.graph.output_node().args[0][0]
    assert classes[result.name] is expected


def test_what_only_takes_the_form_of_the_latent_does_not_change_with_it() -> None:
    captured, classes = formed(
        lambda v: (
            torch.zeros_like(v.x) + v.text.type_as(v.x) + v.t.type_as(v.x) + v.x.new_ones(2, 3)
        )
    )
    text, t = torch.randn(2, 3), torch.ones(2, 3)
    calls = ({"x": torch.randn(2, 3), "timestep": t, "text": text} for _ in range(2))
    over_noise = changed(*(values_of(captured, call) for call in calls))
    assert over_noise == {name for name, kind in classes.items() if kind is LATENT} - {"output"}


class Formed(nn.Module):
    """A residual branch whose text and timestep take the latent's form before their layers."""

    def __init__(self) -> None:
        super().__init__()
        self.caption, self.time, self.inner = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        now = self.time((timestep[:, None] / 1000).expand(-1, 8).type_as(x))
        given = self.caption(text.type_as(x)) + torch.zeros_like(x)
        return x + self.inner(torch.tanh(x + now[:, None] + given))


@pytest.fixture(scope="module")
def formed_run() -> tuple[nn.Module, Recording, Callable[[Any, int], Tensor]]:
    torch.manual_seed(0)
    model = Formed().eval().requires_grad_(False)

    def sample(denoise: Any, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        x, text = (torch.randn(2, 5, 8, generator=draw) for _ in range(2))
        with torch.no_grad():
            for k in range(6):
                timestep = torch.full((2,), 900.0 - 100 * k)
                x = 0.9 * x - 0.1 * denoise(x=x, timestep=timestep, text=text)
        return x

    with record(model) as recording:
        for seed in (1, 2):
            recording.finish(sample(model, seed))
    return model, recording, sample


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["step", "pair", "sampler"])
def test_every_layout_agrees_where_the_latent_lends_its_form(
    layout: str, formed_run: tuple[nn.Module, Recording, Any], tmp_path: Path
) -> None:
    model, recording, sample = formed_run
    plan = Plan.from_trajectory(model, recording, rank=8, correct=False)
    fast = optimize(model, plan)
    sampler = read_sampler(fast, recording) if layout == "sampler" else None
    export_onnx(fast, tmp_path / "out", layout=layout, sampler=sampler)
    session = Session(tmp_path / "out")
    if layout == "sampler":
        draw = torch.Generator().manual_seed(3)
        noise, text = (torch.randn(2, 5, 8, generator=draw) for _ in range(2))
        got = torch.from_numpy(session.sample(noise, text=text))
    else:
        steps = iter(range(6))
        got = sample(lambda **call: torch.from_numpy(session.step(next(steps), **call)), 3)
    # float32 in two runtimes, at full rank over 6 steps.
    torch.testing.assert_close(got, sample(model, 3), rtol=1e-3, atol=1e-4)


# --- what cannot be classed -------------------------------------------------------------------


def test_single_steps_are_refused() -> None:
    with pytest.raises(DependenceError) as caught:
        _ = recorded([{"x": torch.randn(2, 3), "timestep": torch.tensor(9)}]).dependence
    message = str(caught.value)
    assert "dependence: recording: expected a run of at least 2 steps, got 1 step." in message
    assert "Record a whole sampler run." in message


@pytest.mark.parametrize("moving", [True, False])
def test_calls_without_a_latent_are_refused(moving: bool) -> None:
    x = torch.randn(2, 3)
    calls = ({"x": x, "timestep": torch.tensor(t * moving)} for t in (9, 5, 1))
    with pytest.raises(DependenceError) as caught:
        _ = recorded(calls).dependence
    message = str(caught.value)
    assert "dependence: x, timestep: expected an input that changes over the steps" in message
    assert "got none that does. Record the calls of a real sampler" in message
