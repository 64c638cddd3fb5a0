"""The `pair` layout: one ONNX model for every mode over one file of weights."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusion import GuidedDDIM
from onnx import TensorProto
from support.artifacts import exported, kept_refreshes
from support.models import STEPS, relative

from calicache.export import Session, export_onnx
from calicache.graph_passes import OptimizedModel, StepMode, optimize
from calicache.graph_passes.common.errors import ArtifactError, RunError

pytestmark = pytest.mark.slow

R, C, U, FORECAST = StepMode
# Relative L2. Both layouts run the same nodes on the same weights; ONNX Runtime may fuse some
# of them in one model and not in the other (float32, 6e-8 an operation). A wrong variant or a
# stale cache is off by 1e-3 and more.
SAME = 1e-6
NAMES = ["paper", "forecast"]
FILES = {
    "paper": ["calibrate.onnx", "graphs.json.gz", "manifest.json", "refresh.onnx", "weights.bin"],
    "forecast": [
        *("calibrate.onnx", "forecast.onnx", "graphs.json.gz", "manifest.json"),
        *("refresh.onnx", "reuse.onnx", "weights.bin"),
    ],
}

Place = tuple[int, int]


@pytest.fixture(scope="module")
def fasts(dit, dit_plan, forecast_plan) -> dict[str, OptimizedModel]:
    """The paper's method (R C C R C C, order 0), and all modes at order 2 with output weights."""
    return {"paper": optimize(dit, dit_plan), "forecast": optimize(dit, forecast_plan)}


@pytest.fixture(scope="module")
def pairs(fasts) -> dict[str, Path]:
    return {name: exported(fast, "pair") for name, fast in fasts.items()}


@pytest.fixture(scope="module")
def steps(fasts) -> dict[str, Path]:
    return {name: exported(fast) for name, fast in fasts.items()}


@pytest.fixture
def damaged(pairs, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(pairs["paper"], tmp_path / "damaged.d"))


def models(folder: Path) -> dict[str, onnx.ModelProto]:
    """By file name, without the weights."""
    paths = sorted(folder.glob("*.onnx"))
    return {path.stem: onnx.load(path, load_external_data=False) for path in paths}


def outside(model: onnx.ModelProto) -> dict[str, Place]:
    """Offset and length of every initializer in the weights file."""
    places = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            assert entries["location"] == "weights.bin"
            places[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return places


# --- agreement ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_that_of_the_step_layout(name: str, pairs, steps, dit_recording) -> None:
    pair, step = Session(pairs[name]), Session(steps[name])
    for _ in range(2):  # the second run starts with the first one's caches
        for k, call in enumerate(dit_recording.calls):
            got, expected = (torch.from_numpy(s.step(k, **call)) for s in (pair, step))
            assert relative(got, expected) < SAME, k
    one, other = kept_refreshes(pair), kept_refreshes(step)
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert list(mine) == list(theirs)
        for name, value in mine.items():
            np.testing.assert_allclose(value.numpy(), theirs[name].numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_whole_run_in_closed_loop_agrees_with_eager(name: str, fasts, pairs) -> None:
    session, count = Session(pairs[name]), iter(range(STEPS))
    noise = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(5))
    sampler, labels = GuidedDDIM(STEPS, 1.5, 10), torch.tensor([4, 7])
    got = sampler.sample(
        lambda **inputs: torch.from_numpy(session.step(next(count), **inputs)), noise, labels
    )
    fasts[name].reset()
    expected = sampler.sample(fasts[name], noise, labels)
    # torch's kernels against ONNX Runtime's, over 6 steps that DDIM's 1 / sqrt(a) amplifies.
    assert relative(got, expected) < 1e-5
    assert relative(got, sampler.sample(fasts[name].original, noise, labels)) > 1e-4


def test_cheap_step_before_any_refresh_is_refused(pairs, dit_recording) -> None:
    with pytest.raises(RunError, match="step 1: expected a REFRESH step before it"):
        Session(pairs["paper"]).step(1, **dit_recording.calls[1])


# --- the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_folder_holds_a_model_for_every_mode_and_one_file_of_weights(name: str, pairs) -> None:
    assert sorted(path.name for path in pairs[name].iterdir()) == FILES[name]
    manifest = Session(pairs[name]).manifest
    assert manifest.layout == "pair"
    listed = sorted([*(file.name for file in manifest.files), "manifest.json"])
    assert listed == FILES[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_model_passes_the_full_check_and_has_no_control_flow(name: str, pairs) -> None:
    for mode, model in models(pairs[name]).items():
        onnx.checker.check_model(pairs[name] / f"{mode}.onnx", full_check=True)
        assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan"}
        assert all(
            not attribute.HasField("g") for n in model.graph.node for attribute in n.attribute
        )


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_the_models_own_the_step_and_what_the_mode_reads(name: str, pairs) -> None:
    manifest = Session(pairs[name]).manifest
    own = [spec.name for spec in manifest.inputs]
    caches = [cache.name for cache in manifest.caches]
    for mode, model in models(pairs[name]).items():
        record = manifest.mode(StepMode[mode.upper()])
        names = [value.name for value in model.graph.input]
        assert [n for n in names if n != "step"] == [*own, *record.reads]
        outputs = [value.name for value in model.graph.output]
        assert outputs == ["output", *(f"{cache}_next" for cache in record.writes)]
        kept = [c for c in caches if c.startswith("cache_output")] if record.mode is C else []
        assert [*record.writes] == (caches if record.mode is R else kept)
    # At order 0 without output weights no mode reads weights of its step, but the anchor's.
    assert "step" not in [value.name for value in models(pairs["paper"])["refresh"].graph.input]
    assert "step" in [value.name for value in models(pairs["forecast"])["refresh"].graph.input]


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_two_modes_use_stand_once(name: str, pairs) -> None:
    weights = {mode: outside(model) for mode, model in models(pairs[name]).items()}
    shared = set(weights["refresh"]) & set(weights["calibrate"])
    assert len(shared) >= 10  # embeddings, the modulations and the last layers at the least
    places: dict[str, Place] = {}
    for mode in weights.values():
        for weight, place in mode.items():
            assert places.setdefault(weight, place) == place
    spans = sorted(places.values())
    assert all(offset + length <= after for (offset, length), (after, _) in pairwise(spans))
    content = (pairs[name] / "weights.bin").read_bytes()
    assert spans[-1][0] + spans[-1][1] <= len(content)
    values = [content[offset : offset + length] for offset, length in spans]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", NAMES)
def test_weights_file_is_not_larger_than_the_step_layouts(name: str, pairs, steps) -> None:
    size, step_size = ((d[name] / "weights.bin").stat().st_size for d in (pairs, steps))
    # 5 %: other alignment in the file.
    assert 0.95 * step_size < size < 1.05 * step_size


def test_second_export_gives_the_same_bytes(fasts, pairs, tmp_path: Path) -> None:
    manifest = export_onnx(fasts["paper"], tmp_path / "d", layout="pair")
    assert manifest == Session(pairs["paper"]).manifest  # digests of all files


def test_folder_can_be_moved(damaged, pairs, dit_recording, tmp_path: Path) -> None:
    moved = shutil.move(damaged, tmp_path / "my models (1) é")
    got, expected = (
        Session(folder).step(0, **dit_recording.calls[0]) for folder in (moved, pairs["paper"])
    )
    # Bit by bit: the same files.
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("name", FILES["paper"])
def test_missing_file_is_refused_by_name(name: str, damaged) -> None:
    (damaged / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        Session(damaged)


@pytest.mark.parametrize("name", ["refresh.onnx", "weights.bin"])
def test_flipped_bit_and_cut_file_are_refused_by_name(name: str, damaged) -> None:
    content = (damaged / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (damaged / name).write_bytes(flipped)
    with pytest.raises(ArtifactError, match=f"{name}: expected SHA-256"):
        Session(damaged)
    (damaged / name).write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=rf"{name}: expected \d+ bytes, got \d+ bytes"):
        Session(damaged)
