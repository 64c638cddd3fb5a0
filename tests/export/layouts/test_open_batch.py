"""One file for every batch: equal to the model at each, and refused where it could not be."""

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
    with pytest.raises(RunError, match="expected the 4 samples of this run, got 6"):
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
    assert [(s.dimension, s.times) for s in manifest.open_sizes["class_labels"]] == [(0, 2)]


def test_standard_files_pass_the_checker_and_strict_shape_inference(fast) -> None:
    for layout in ("step", "sampler"):
        file = exported(fast, layout, attention="standard", **OPEN) / "model.onnx"
        onnx.checker.check_model(file, full_check=True)
        onnx.shape_inference.infer_shapes(onnx.load(file), strict_mode=True, data_prop=True)


@pytest.mark.parametrize("name", MODELS)
def test_models_of_diffusers_are_equal_at_every_batch(name: str, tmp_path: Path) -> None:
    """At the recorded batch what torch gives, and at others the same row by row."""
    entry = ENTRIES[name]
    model = make_model(entry)
    with record(model) as recording:
        run = run_sampler(model, entry, 2, linear=True)
        recording.finish(run.latents)
    fast = optimize(model, Plan.from_trajectory(model, recording, schedule="RCURC", rank=2))
    calls = recording.calls
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
    with pytest.raises(ExportError, match=f"dynamic batch.*{name}.*[lL]eave dynamic out"):
        export_onnx(compiled(op), tmp_path / "d", **OPEN)
    assert not (tmp_path / "d").exists()


def test_other_names_are_refused_in_words(tmp_path) -> None:
    with pytest.raises(ExportError, match=r"dynamic: expected batch, got 'tokens'.*position table"):
        export_onnx(compiled(nn.Identity()), tmp_path / "d", dynamic=("batch", "tokens"))
    with pytest.raises(CalicacheError, match="a list or tuple of texts"):
        export_onnx(compiled(nn.Identity()), tmp_path / "d", dynamic="batch")


def test_tables_whose_rows_are_alike_grow(tmp_path) -> None:
    fast = compiled(lambda x: x + torch.linspace(0, 1, 5)[None, :, None].expand(x.shape[0], 5, 16))
    export_onnx(fast, tmp_path / "d", **OPEN)
    session = Session(tmp_path / "d")
    assert [mode.mode for mode in session.manifest.modes] == [StepMode.REFRESH, StepMode.CALIBRATE]
    for batch in BATCHES:
        x, t = torch.randn(batch, 5, 16), torch.ones(batch)
        assert relative(torch.from_numpy(session.step(0, x=x, timestep=t)), fast(x, t)) < SAME
