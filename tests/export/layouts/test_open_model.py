"""One file for all sizes: equal to the model at each, and refused where it could not be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusion import GuidedDDIM
from support.artifacts import exported
from support.models import STEPS, relative, sample_dit
from torch import Tensor, nn
from zoo.drive import first_tensor, make_model, run_sampler
from zoo.report import ENTRIES

from calicache.export import Session, export_onnx, load_artifact
from calicache.graph_passes import OptimizedModel, Plan, StepMode, optimize, record
from calicache.graph_passes.common.errors import CalicacheError, ExportError, RunError

pytestmark = pytest.mark.slow

BATCHES = (1, 2, 6)
OPEN: dict[str, Any] = {"dynamic": ("batch",)}
# float32 (6e-8) in another order, some layers deep.
SAME = 1e-5
MODELS = (
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "QwenImageTransformer2DModel",
)


@pytest.fixture(scope="module")
def fast(dit, forecast_plan) -> OptimizedModel:
    """The sample's guided run, recorded with two images: all four modes, order 2."""
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    schedule = forecast_plan.schedule
    return optimize(dit, Plan.from_trajectory(dit, recording, schedule=schedule, rank=4))


def noise_and_labels(batch: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 1, 28, 28, generator=draw), torch.arange(batch) % 10


def expected_of(fast: OptimizedModel, batch: int) -> Tensor:
    noise, labels = noise_and_labels(batch)
    fast.reset()
    return GuidedDDIM(STEPS, 1.5, 10).sample(fast, noise, labels)


def test_one_sampler_file_is_right_at_every_batch(fast) -> None:
    session = Session(exported(fast, "sampler", **OPEN))
    for batch in BATCHES:
        noise, labels = noise_and_labels(batch)
        both = torch.cat([labels, torch.full((batch,), 10)])
        got = torch.from_numpy(session.sample(noise, class_labels=both))
        # The sampler's tables are fitted to a float32 recording.
        assert relative(got, expected_of(fast, batch)) < 2e-5


@pytest.mark.parametrize("layout", ["step", "pair"])
def test_one_session_runs_one_batch_after_another(layout: str, fast) -> None:
    session = Session(exported(fast, layout, **OPEN))
    for batch in (*BATCHES, 2):
        steps = iter(range(STEPS))

        def step(steps: Any = steps, **inputs: Tensor) -> Tensor:
            return torch.from_numpy(session.step(next(steps), **inputs))

        got = GuidedDDIM(STEPS, 1.5, 10).sample(step, *noise_and_labels(batch))
        assert relative(got, expected_of(fast, batch)) < SAME


def test_another_batch_within_a_run_is_refused_and_the_run_can_go_on(fast) -> None:
    session = Session(exported(fast, "step", **OPEN))

    def call(rows: int) -> dict[str, Tensor]:
        labels = torch.zeros(rows, dtype=torch.int64)
        return {
            "hidden_states": torch.ones(rows, 1, 28, 28),
            "timestep": labels,
            "class_labels": labels,
        }

    session.step(0, **call(4))
    with pytest.raises(RunError, match="input batch: expected 4, as in this run, got 6"):
        session.step(1, **call(6))
    assert session.step(1, **call(4)).shape[0] == 4
    with pytest.raises(RunError, match=r"input class_labels: expected int64 \(4,\)"):
        session.step(2, **{**call(4), "class_labels": torch.zeros(3, dtype=torch.int64)})


def test_shapes_in_the_file_are_written_in_batches(fast) -> None:
    folder = exported(fast, "sampler", **OPEN)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["noise"] == shapes["latents"] == ["batch", 1, 28, 28]
    assert shapes["class_labels"] == ["2*batch"]
    manifest = load_artifact(folder)
    (size,) = manifest.open_sizes["class_labels"]
    assert (size.dimension, str(size.formula)) == (0, "2*batch")


def test_standard_files_pass_the_checker_and_strict_shape_inference(fast) -> None:
    for layout in ("step", "sampler"):
        file = exported(fast, layout, attention="standard", **OPEN) / "model.onnx"
        onnx.checker.check_model(file, full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, data_prop=True)


def optimized_and_recorded(name: str) -> tuple[OptimizedModel, tuple[dict[str, Tensor], ...]]:
    """A tiny transformer of diffusers, recorded with two samples, and its recorded calls."""
    entry = ENTRIES[name]
    model = make_model(entry)
    with record(model) as recording:
        recording.finish(run_sampler(model, entry, 2, linear=True).latents)
    plan = Plan.from_trajectory(model, recording, schedule="RCURC", rank=2)
    return optimize(model, plan), tuple(map(dict, recording.calls))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_diffusers_are_equal_at_every_batch(name: str, tmp_path: Path) -> None:
    """At the recorded batch what torch gives, and at others the same row by row."""
    fast, calls = optimized_and_recorded(name)
    for layout in ("step", "sampler"):
        export_onnx(fast, tmp_path / layout, layout=layout, **OPEN)
    steps, whole = Session(tmp_path / "step"), Session(tmp_path / "sampler")
    wide = {batch: [_rows(steps, call, batch) for call in calls] for batch in BATCHES}
    outputs = {batch: [steps.step(k, **c) for k, c in enumerate(wide[batch])] for batch in BATCHES}
    latents = {batch: whole.sample(**_run_inputs(whole, wide[batch][0])) for batch in BATCHES}
    for got, call in zip(outputs[2], calls, strict=True):
        assert relative(torch.from_numpy(got), first_tensor(fast(**unflattened(fast, call)))) < SAME
    for results in (*zip(*outputs.values(), strict=True), tuple(latents.values())):
        one, two, six = (torch.from_numpy(result) for result in results)
        assert relative(one, six[:1]) < SAME
        assert relative(two, six[:2]) < SAME


def unflattened(fast: OptimizedModel, call: dict[str, Tensor]) -> dict[str, Any]:
    return fast.plan.binding.signature.unflatten(list(call.values()))


def _rows(session: Session, call: dict[str, Tensor], batch: int) -> dict[str, np.ndarray]:
    """The two recorded samples, three times over, as far as the batch goes."""
    opened = session.manifest.open_sizes
    return {
        name: np.concatenate([value.numpy()] * 3)[:batch] if name in opened else value.numpy()
        for name, value in call.items()
    }


def _run_inputs(session: Session, call: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    sampler = session.manifest.sampler
    assert sampler is not None
    names = {spec.name for spec in sampler.inputs}
    return {"noise": call[sampler.latent]} | {n: v for n, v in call.items() if n in names}


class Residual(nn.Module):
    """A residual branch, and then what a test wants."""

    def __init__(self, op: Any) -> None:
        super().__init__()
        self.fc1, self.fc2, self.op = nn.Linear(16, 32), nn.Linear(32, 16), op

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = x * timestep[:, None, None]
        return self.op(x + self.fc2(torch.tanh(self.fc1(h))))


def compiled(op: Any) -> OptimizedModel:
    model = Residual(op).eval().requires_grad_(False)
    with record(model) as recording:
        for step in range(3):
            model(torch.randn(2, 5, 16), torch.full((2,), 1 - 0.1 * step))
    plan = Plan.from_trajectory(model, recording, rank=2, order=0, correct=False)
    return optimize(model, plan)


REFUSED: dict[str, tuple[Any, str]] = {
    "a number": (lambda x: x * x.shape[0], "mul"),
    "a branch on one": (lambda x: x.sin() if x.shape[0] == 1 else x.cos(), "(sin|cos)"),
    "a branch on the recorded one": (lambda x: x.sin() if x.shape[0] == 2 else x.cos(), "sin"),
    "a table by row": (lambda x: x + torch.arange(x.shape[0])[:, None, None], "unsqueeze"),
    "as many operations": (lambda x: torch.cat([row.sin() for row in x.split(1)]), "getitem"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_made_for_one_batch_is_refused_by_name(case: str, tmp_path) -> None:
    op, name = REFUSED[case]
    with pytest.raises(ExportError, match=f"dynamic.*{name}.*[lL]eave it out of dynamic"):
        export_onnx(compiled(op), tmp_path / "d", **OPEN)
    assert not (tmp_path / "d").exists()


def test_other_names_are_refused_in_words(tmp_path) -> None:
    with pytest.raises(
        ExportError, match=r"dynamic: expected batch \| prompt \| tokens, got 'rows'"
    ):
        export_onnx(compiled(nn.Identity()), tmp_path / "d", dynamic=("batch", "rows"))
    with pytest.raises(CalicacheError, match="a list or tuple of texts"):
        export_onnx(compiled(nn.Identity()), tmp_path / "d", dynamic="batch")
    with pytest.raises(ExportError, match=r"prompt: one text \(B, tokens, channels\).*are none"):
        export_onnx(compiled(nn.Identity()), tmp_path / "d", dynamic=("prompt",))


def at_lengths(call: dict[str, Any], batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    """A recorded call of Flux with other values of other sizes."""
    draw = torch.Generator().manual_seed(batch + prompt + tokens)
    latent = torch.randn(batch, tokens, call["hidden_states"].shape[2], generator=draw)
    text = torch.randn(batch, prompt, call["encoder_hidden_states"].shape[2], generator=draw)
    places = torch.stack([torch.zeros(tokens), torch.arange(tokens), torch.arange(tokens)], 1)
    rows = {name: call[name][:1].expand(batch, *call[name].shape[1:]) for name in call}
    return {
        **rows,
        "hidden_states": latent,
        "encoder_hidden_states": text,
        "txt_ids": torch.zeros(prompt, 3),
        "img_ids": places,
    }


def test_prompt_tokens_and_batch_are_open_at_once(tmp_path: Path) -> None:
    """Flux: one sequence of text and latent, whose positions are inputs."""
    fast, recorded = optimized_and_recorded("FluxTransformer2DModel")
    export_onnx(fast, tmp_path / "d", dynamic=("batch", "prompt", "tokens"))
    session = Session(tmp_path / "d")
    sizes = {str(s.formula) for sizes in session.manifest.open_sizes.values() for s in sizes}
    assert {"batch", "prompt", "tokens", "prompt + tokens"} <= sizes
    for lengths in ((2, 7, 16), (1, 12, 9), (6, 3, 25)):
        calls = [at_lengths(call, *lengths) for call in recorded]
        other = fast.for_call(**unflattened(fast, calls[0]))
        for step, call in enumerate(calls):
            got = torch.from_numpy(session.step(step, **call))
            assert relative(got, first_tensor(other(**unflattened(fast, call)))) < SAME
    with pytest.raises(RunError, match="input prompt: expected 3, as in this run, got 4"):
        session.step(1, **at_lengths(recorded[1], 6, 4, 25))


def test_prompt_of_a_whole_run_is_open(tmp_path: Path) -> None:
    """PixArt: attention to a text with a mask."""
    fast, recorded = optimized_and_recorded("PixArtTransformer2DModel")
    export_onnx(fast, tmp_path / "long", layout="sampler", dynamic=("prompt",))
    session = Session(tmp_path / "long")
    call = recorded[0]
    given = {k: v.numpy() for k, v in call.items()}
    names = ("encoder_hidden_states", "encoder_attention_mask")
    whole = session.sample(**_run_inputs(session, given))
    # Text that the mask takes out changes nothing: exp(-10000) is 0 in float32.
    given |= {name: np.concatenate([given[name]] * 2, 1) for name in names}
    given[names[1]][:, given[names[1]].shape[1] // 2 :] = 0
    assert (
        relative(
            torch.from_numpy(session.sample(**_run_inputs(session, given))), torch.from_numpy(whole)
        )
        < SAME
    )


def test_tables_whose_rows_are_alike_grow(tmp_path) -> None:
    fast = compiled(lambda x: x + torch.linspace(0, 1, 5)[None, :, None].expand(x.shape[0], 5, 16))
    export_onnx(fast, tmp_path / "d", **OPEN)
    session = Session(tmp_path / "d")
    assert [mode.mode for mode in session.manifest.modes] == [StepMode.REFRESH, StepMode.CALIBRATE]
    for batch in BATCHES:
        x, t = torch.randn(batch, 5, 16), torch.ones(batch)
        assert relative(torch.from_numpy(session.step(0, x=x, timestep=t)), fast(x, t)) < SAME
