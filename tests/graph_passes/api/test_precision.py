"""Models of other dtypes than float32: what is stored, what stays float32, what agrees."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from support.models import relative, shake
from torch import Tensor, nn

from calicache.export import Layout, Session, export_onnx, read_sampler
from calicache.export.artifact.manifest import model_file
from calicache.graph_passes import Plan, Recording, StepMode, Weighting, optimize, record
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.common.errors import ExportError

pytestmark = pytest.mark.slow

R, C, U, _ = StepMode
SCHEDULE = (R, C, U, R, C, C)
LABELS = torch.tensor([1, 2, 10, 10])


def sample(model, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """A guided Euler run with latents in float32 around a model in another dtype."""
    x = noise
    with torch.no_grad():
        for now in torch.linspace(999, 0, len(SCHEDULE)).long():
            both = torch.cat([x, x]).to(dtype)
            output = model(hidden_states=both, timestep=now.expand(4), class_labels=LABELS)
            conditional, unconditional = output.sample.float()[:, :4].chunk(2)
            x = x - 0.1 * (unconditional + 2.0 * (conditional - unconditional))
    return x


def draw(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["half", "bfloat"])
def exports(
    request: pytest.FixtureRequest,
    diffusers_dit: DiTTransformer2DModel,
    tmp_path_factory: pytest.TempPathFactory,
):
    dtype: torch.dtype = request.param
    model = copy.deepcopy(diffusers_dit).to(dtype)
    with record(model) as recording:
        recording.finish(sample(model, draw(1), dtype))
    plan = Plan.from_trajectory(model, recording, schedule=SCHEDULE, rank=4, order=1)
    fast = optimize(model, plan)
    folder = tmp_path_factory.mktemp("precision")
    for layout in Layout:
        sampler = read_sampler(fast, recording) if layout is Layout.SAMPLER else None
        export_onnx(fast, folder / layout, layout=layout, sampler=sampler)
    return dtype, fast, folder


@pytest.mark.parametrize("layout", list(Layout))
def test_weights_and_caches_have_the_models_dtype(exports, layout: Layout) -> None:
    dtype, fast, folder = exports
    wanted = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}
    for mode in {*SCHEDULE}:
        path = folder / layout / model_file(layout, mode)
        onnx.checker.check_model(path, full_check=True)
        stored = onnx.load(path, load_external_data=False).graph.initializer
        large = {tensor.data_type for tensor in stored if len(tensor.dims) == 2}
        assert wanted[dtype] in large
    assert {cache.dtype for cache in fast.compiled.variant_set.caches} == {dtype}


def test_sampler_takes_and_returns_float32(exports) -> None:
    *_, folder = exports
    model = onnx.load(folder / "sampler" / "model.onnx", load_external_data=False)
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)
    }
    assert types["noise"] == types["latents"] == onnx.TensorProto.FLOAT
    assert types["guidance_scale"] == onnx.TensorProto.FLOAT


def eager(fast: OptimizedModel, dtype: torch.dtype) -> Tensor:
    fast.reset()
    return sample(fast, draw(2), dtype)


@pytest.mark.parametrize("exports", [torch.float16], indirect=True)
@pytest.mark.parametrize("layout", list(Layout))
def test_half_precision_agrees_with_eager(exports, layout: Layout) -> None:
    dtype, fast, folder = exports
    session = Session(folder / layout)
    if layout is Layout.SAMPLER:
        got = torch.from_numpy(session.sample(draw(2), class_labels=LABELS))
    else:
        steps = iter(range(len(SCHEDULE)))

        def denoise(**tensors: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=torch.from_numpy(session.step(next(steps), **tensors)))

        got = sample(denoise, draw(2), dtype)
    # float16 rounds at 5e-4 a value, in another order of operations; 6 steps of a tenth each,
    # guidance tripling what the two halves differ by.
    assert relative(got, eager(fast, dtype)) < 2e-3


@pytest.mark.parametrize("exports", [torch.bfloat16], indirect=True)
@pytest.mark.parametrize("layout", list(Layout))
def test_bfloat16_is_refused_by_the_cpu_with_a_way_out(exports, layout: Layout) -> None:
    *_, folder = exports
    with pytest.raises(ExportError, match="CPUExecutionProvider") as caught:
        Session(folder / layout)
    assert "another dtype" in caught.value.fix
    assert ("layout pair" in caught.value.fix) == (layout is not Layout.PAIR)


class Attended(nn.Module):
    """Attention and a perceptron, of operations that ONNX Runtime's CPU provider has in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(16, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.embed(x) + timestep[:, None, None]
        q, k, v = (p(x).unflatten(2, (2, 8)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(x + self.fc2(self.fc1(x).relu()))


# float64 rounds at 1e-16; anchors weigh kept values by 31 at most, in two branches of 16 channels.
EXACT = 1e-12
# REFRESH steps between which an anchor's weights are thirds, which no float32 number is.
THIRDS = (R, C, C, R, C, C)


@pytest.fixture(scope="module")
def double() -> tuple[nn.Module, Recording]:
    torch.manual_seed(0)
    model = shake(Attended(), 0.2).double()
    x = draw(1)[:, :, 0].double()
    with record(model) as recording, torch.no_grad():
        for now in torch.linspace(1, 0, len(SCHEDULE), dtype=torch.float64):
            x = x - 0.1 * model(x, now.expand(2))
        recording.finish(x)
    return model, recording


@pytest.mark.parametrize("correct", [False, True], ids=["plain", "fitted"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("weighting", list(Weighting))
def test_full_rank_in_float64_is_the_original(
    double: tuple[nn.Module, Recording], weighting: Weighting, order: int, correct: bool
) -> None:
    model, recording = double
    plan = Plan.from_trajectory(
        model,
        recording,
        schedule=THIRDS,
        rank=16,
        order=order,
        weighting=weighting,
        correct=correct,
    )
    fast = optimize(model, plan)
    for call in recording.calls:
        with torch.no_grad():
            assert relative(fast(**call), model(**call)) < EXACT


@pytest.mark.parametrize("layout", [Layout.STEP, Layout.PAIR])
def test_float64_attention_runs_and_agrees_with_torch(
    double: tuple[nn.Module, Recording], layout: Layout, tmp_path: Path
) -> None:
    model, recording = double
    plan = Plan.from_trajectory(model, recording, schedule=THIRDS, rank=16, correct=False)
    export_onnx(optimize(model, plan), tmp_path / "d", layout=layout)
    session = Session(tmp_path / "d")
    for step, call in enumerate(recording.calls):
        with torch.no_grad():
            assert relative(torch.from_numpy(session.step(step, **call)), model(**call)) < EXACT
