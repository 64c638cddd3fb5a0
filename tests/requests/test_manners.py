"""An optimised model where the original was: class, pickles, folders of pipelines, offloading."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import ModelMixin, PixArtAlphaPipeline
from safetensors.torch import load_file, save_model
from support.models import relative
from support.pipelines.tiny import CASES, PipelineCase
from torch import Tensor, nn

from calicache.graph_passes import OptimizedModel, Plan, StepMode, optimize, record
from calicache.graph_passes.common.errors import CaptureError, RunError

PIXART = next(case for case in CASES if case.name == "pixart")
pytestmark = pytest.mark.slow

PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def planned() -> tuple[PipelineCase, Plan, Tensor]:
    """A pipeline, a plan of it, and what its optimised transformer makes of the prompt."""
    pipe = PIXART.build()
    with record(pipe.transformer) as recording:
        PIXART.latents(pipe, PROMPT)
    plan = Plan.from_trajectory(pipe.transformer, recording, schedule=2, rank=4)
    pipe.transformer = optimize(pipe.transformer, plan)
    return PIXART, plan, PIXART.latents(pipe, PROMPT)


def test_it_is_of_both_classes(planned: tuple[PipelineCase, Plan, Tensor]) -> None:
    case, plan, _ = planned
    original = case.build().transformer
    fast = optimize(original, plan)
    assert isinstance(fast, OptimizedModel)
    assert isinstance(fast, ModelMixin)
    assert isinstance(fast, type(original))
    assert repr(fast).startswith(f"{type(original).__name__} optimised by calicache")
    assert type(fast) is OptimizedModel


@pytest.mark.parametrize("way", ["pickle", "torch.save", "deepcopy"])
def test_copies_do_the_same(way: str, planned: tuple[PipelineCase, Plan, Tensor]) -> None:
    case, plan, expected = planned
    pipe = case.build()
    fast = optimize(pipe.transformer, plan)
    if way == "pickle":
        copied = pickle.loads(pickle.dumps(fast))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = copy.deepcopy(fast)
    assert type(copied) is OptimizedModel
    pipe.transformer = copied
    assert torch.equal(case.latents(pipe, PROMPT), expected)


def test_a_deep_copy_holds_every_weight_once(planned: tuple[PipelineCase, Plan, Tensor]) -> None:
    case, plan, _ = planned
    fast = optimize(case.build().transformer, plan)
    copied = copy.deepcopy(fast)
    assert not _storages(copied).keys() & _storages(fast).keys()
    assert sum(_storages(copied).values()) == sum(_storages(fast).values()) > 0


def _storages(model: nn.Module) -> dict[int, int]:
    """Bytes of everything that a model and its graphs hold, by address."""
    tensors = (*model.parameters(), *model.buffers())
    storages = (value.untyped_storage() for value in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


@pytest.mark.parametrize("inside", [False, True])
def test_safetensors_saves_it(
    inside: bool, planned: tuple[PipelineCase, Plan, Tensor], tmp_path: Path
) -> None:
    """It refuses tensors that are not contiguous, or that are a part of another's memory.

    Inside of another module the factors are saved too.
    """
    case, plan, _ = planned
    fast = optimize(case.build().transformer, plan)
    model = nn.ModuleList([fast]) if inside else fast
    save_model(model, str(tmp_path / "fast.safetensors"))
    saved = load_file(tmp_path / "fast.safetensors")
    weights = model.state_dict()
    assert any("calibration" in name for name in weights) == inside
    once = {value.data_ptr(): value.nbytes for value in weights.values()}
    assert sum(value.nbytes for value in saved.values()) == sum(once.values())
    assert all(torch.equal(value, weights[name]) for name, value in saved.items())


def test_a_pipeline_is_saved_with_its_plan(
    planned: tuple[PipelineCase, Plan, Tensor], tmp_path: Path
) -> None:
    case, plan, expected = planned
    pipe = case.build()
    plain = case.latents(pipe, PROMPT)
    pipe.transformer = optimize(pipe.transformer, plan)
    pipe.save_pretrained(tmp_path / "pipe")

    loaded = PixArtAlphaPipeline.from_pretrained(tmp_path / "pipe")
    loaded.set_progress_bar_config(disable=True)
    # Float32 weights, the same operations: only the order of sums may differ.
    assert relative(case.latents(loaded, PROMPT), plain) < 1e-5
    kept = Plan.load(tmp_path / "pipe" / "transformer" / "calicache.plan")
    loaded.transformer = optimize(loaded.transformer, kept)
    assert relative(case.latents(loaded, PROMPT), expected) < 1e-5


def test_a_variant_of_the_weights_is_found_beside_the_plan(
    planned: tuple[PipelineCase, Plan, Tensor], tmp_path: Path
) -> None:
    case, plan, _ = planned
    pipe = case.build()
    plain = case.latents(pipe, PROMPT)
    pipe.transformer = optimize(pipe.transformer, plan)
    pipe.save_pretrained(tmp_path / "pipe", variant="fp16", safe_serialization=False)
    names = {path.name for path in (tmp_path / "pipe" / "transformer").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.fp16.bin", "calicache.plan"}

    loaded = PixArtAlphaPipeline.from_pretrained(tmp_path / "pipe", variant="fp16")
    loaded.set_progress_bar_config(disable=True)
    # The name of a variant says nothing of the numbers: these are the same float32 weights.
    assert relative(case.latents(loaded, PROMPT), plain) < 1e-5
    with pytest.raises(ValueError, match="variant=bf16"):
        PixArtAlphaPipeline.from_pretrained(tmp_path / "pipe", variant="bf16")


def test_its_weights_have_the_names_of_the_original(
    planned: tuple[PipelineCase, Plan, Tensor],
) -> None:
    case, plan, expected = planned
    pipe = case.make()
    original = pipe.transformer
    fast = optimize(original, plan, on_change="refactor")
    pipe.transformer = fast
    weights = {name: value.clone() for name, value in fast.state_dict().items()}
    assert list(weights) == list(original.state_dict())
    fast.load_state_dict({name: 0.9 * value for name, value in weights.items()})
    assert relative(case.latents(pipe, PROMPT), expected) > 0.01
    fast.load_state_dict(weights)
    assert torch.equal(case.latents(pipe, PROMPT), expected)
    around = nn.ModuleDict({"model": fast})
    around.load_state_dict(around.state_dict())  # which has the names of all that is inside
    assert torch.equal(case.latents(pipe, PROMPT), expected)


def test_a_pipeline_takes_it_for_its_transformer(
    planned: tuple[PipelineCase, Plan, Tensor], tmp_path: Path
) -> None:
    case, plan, expected = planned
    pipe = case.build()
    pipe.save_pretrained(tmp_path / "pipe")
    fast = optimize(pipe.transformer, plan)
    loaded = PixArtAlphaPipeline.from_pretrained(tmp_path / "pipe", transformer=fast)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.transformer) is OptimizedModel
    assert relative(case.latents(loaded, PROMPT), expected) < 1e-5


@pytest.mark.parametrize("cheap", [StepMode.FORECAST, StepMode.CALIBRATE])
def test_sequential_offloading_goes_with_forecasts_and_is_refused_with_graphs(
    cheap: StepMode,
) -> None:
    pipe = PIXART.build()
    original = pipe.transformer = copy.deepcopy(pipe.transformer)
    with record(original) as recording:
        PIXART.latents(pipe, PROMPT)
    schedule = [StepMode.REFRESH, cheap] * 3
    plan = Plan.from_trajectory(original, recording, schedule=schedule, rank=4)
    fast = pipe.transformer = optimize(original, plan)
    expected = PIXART.latents(pipe, PROMPT)
    fast.reset()
    cpu_offload(original, execution_device=torch.device("cpu"))
    if cheap is StepMode.CALIBRATE:
        with pytest.raises(RunError, match="weights that the model was optimised with"):
            PIXART.latents(pipe, PROMPT)
    else:
        # The same operations on copies of the same weights.
        assert relative(PIXART.latents(pipe, PROMPT), expected) < 1e-5


def test_layerwise_casting_goes_with_forecasts_and_is_refused_with_graphs() -> None:
    """Weights in 8 bits that hooks make floats of, a layer at a time."""
    bits = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    pipe = PIXART.build()
    original = pipe.transformer = copy.deepcopy(pipe.transformer)
    original.enable_layerwise_casting(**bits)
    with record(original) as recording:
        expected = PIXART.latents(pipe, PROMPT)
    with pytest.raises(
        CaptureError, match="REFRESH and FORECAST steps alone: those run the model whole"
    ):
        Plan.from_trajectory(original, recording, schedule="RCRCRC", rank=4)
    plan = Plan.from_trajectory(original, recording, schedule="RRFRRF", order=1)
    fast = pipe.transformer = optimize(original, plan)
    # A third of six steps is forecast: near, and with the very weights of the recording.
    assert 1e-6 < relative(PIXART.latents(pipe, PROMPT), expected) < 0.1
    with pytest.raises(RunError, match=r"enable_layerwise_casting\(\)"):
        fast.enable_layerwise_casting(**bits)
