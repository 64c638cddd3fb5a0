"""What an evaluation goes on from, and what it refuses: shards, files, networks, samplers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file
from support.small import evaluation
from support.small.evaluation import SIZE, small
from support.small.subjects import small_folder
from torch import Tensor, nn
from torchmetrics.image import fid
from typer.testing import CliRunner

from calicache.graph_passes.common.errors import EvaluateError
from calicache.tools.cli import app
from calicache.tools.evaluate.evaluation import EVALUATION, Evaluation
from calicache.tools.evaluate.npz import NpzImages, write_npz
from calicache.tools.evaluate.run import EvaluateSettings, run_evaluation
from calicache.tools.evaluate.subject import EvaluationModel, load_subject

SPEC = str(Path(evaluation.__file__))


def evaluate(output: Path, subject: EvaluationModel | None = None, **settings: Any) -> Evaluation:
    sizes = {"samples": 4, "shard": 2, "batch": 2, **settings}
    return run_evaluation(
        subject or small(), small_folder() / "plan", EvaluateSettings(output, **sizes)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation") / "finished"
    evaluate(folder)
    return folder


@pytest.fixture
def output(finished: Path, tmp_path: Path) -> Path:
    """A finished evaluation, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def never(*_: Any) -> Tensor:
    raise AssertionError("all of it is there")


def test_shards_that_are_there_are_not_sampled_again(output: Path) -> None:
    before = EVALUATION.read(output / "evaluation.json")
    assert evaluate(output, replace(small(), sample=never)).figures == before.figures


def test_more_samples_go_on_from_fewer(output: Path) -> None:
    first = np.load(output / "full.npz")["arr_0"]
    assert evaluate(output, samples=6).samples == 6
    images = np.load(output / "full.npz")["arr_0"]
    assert len(images) == 6
    np.testing.assert_array_equal(images[:4], first)


def test_shards_of_the_full_model_do_not_depend_on_the_plan(output: Path, tmp_path: Path) -> None:
    for shard in (output / "shards").glob("plan-*"):
        shard.unlink()
    sampled: list[bool] = []

    def sample(denoiser: nn.Module, seeds: Any) -> Tensor:
        sampled.append(denoiser is subject.model)
        return evaluation.sample(denoiser, seeds)

    subject = replace(small(), sample=sample)
    evaluate(output, subject)
    assert sampled == [False, False]


@pytest.mark.parametrize(
    ("change", "expected", "got"),
    [
        ({"subject": evaluation.other_steps()}, "'scale': 0.2", "'scale': 0.1"),
        ({"batch": 1}, "batch 1", "batch 2"),
        ({"shard": 4}, "count 4", "count 2"),
    ],
)
def test_shards_of_other_settings_are_refused(
    output: Path, change: dict[str, Any], expected: str, got: str
) -> None:
    with pytest.raises(EvaluateError) as told:
        evaluate(output, **change)
    assert told.value.where == str(output / "shards" / "full-00000.safetensors")
    assert expected in told.value.expected
    assert got in told.value.got


def test_images_under_another_plan_are_refused(output: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(small_folder() / "plan", tmp_path / "plan"))
    text = (other / "plan.json").read_text()
    (other / "plan.json").write_text(text.replace("\n", "\n\n", 1))  # the same to a reader
    settings = EvaluateSettings(output, 4, 2, 2)
    with pytest.raises(EvaluateError) as told:
        run_evaluation(small(), other, settings)
    assert told.value.where.endswith("plan-00000.safetensors")
    assert told.value.expected.startswith("plan ")


def test_a_damaged_shard_is_refused_and_sampled_again_when_it_is_deleted(output: Path) -> None:
    shard = output / "shards" / "plan-00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(EvaluateError, match="SHA-256") as told:
        evaluate(output)
    assert told.value.where == str(shard)
    shard.unlink()
    evaluate(output)
    assert torch.equal(load_file(shard)["images"], load(whole)["images"])


def test_a_file_in_the_place_of_a_shard_is_refused(output: Path) -> None:
    shard = output / "shards" / "plan-00001.safetensors"
    shard.write_text("a picture")
    with pytest.raises(EvaluateError) as told:
        evaluate(output)
    assert told.value.where == str(shard)


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    plan = str(small_folder() / "plan")
    done = CliRunner().invoke(app, ["evaluate", f"{SPEC}:small", plan, "-o", str(tmp_path)])
    assert done.exit_code == 1
    assert "a folder with other files" in " ".join(done.output.split())


def test_samples_are_whole_shards(tmp_path: Path) -> None:
    with pytest.raises(EvaluateError) as told:
        evaluate(tmp_path / "out", samples=5)
    assert (told.value.where, told.value.got) == ("--samples", "5")


def test_one_shard_has_figures_without_intervals(tmp_path: Path) -> None:
    figures = evaluate(tmp_path / "out", shard=4).figures
    assert list(figures) == ["fid_between", "is_full", "is_plan", "is_difference", "psnr"]
    assert {(figure.low, figure.high, figure.error) for figure in figures.values()} == {
        (None, None, None)
    }


def test_equal_images_have_no_psnr(tmp_path: Path) -> None:
    subject = small()
    still = replace(subject, sample=lambda _, seeds: evaluation.sample(subject.model, seeds))
    result = evaluate(tmp_path / "out", still)
    assert result.equal_images == 4
    assert "psnr" not in result.figures
    # Square roots of what rounding leaves of 0.
    assert abs(result.figures["fid_between"].value) < 1e-6


def returning(images: object) -> Callable[..., Any]:
    return lambda *_: images


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(2, *SIZE), "torch.float32 (2, 5, 4, 1)"),
        (torch.zeros(3, *SIZE, dtype=torch.uint8), "torch.uint8 (3, 5, 4, 1)"),
        (torch.zeros(2, 5, 4, dtype=torch.uint8), "torch.uint8 (2, 5, 4)"),
        (None, "NoneType"),
    ],
)
def test_a_sampler_that_returns_no_images_is_refused(
    images: object, got: str, tmp_path: Path
) -> None:
    with pytest.raises(EvaluateError) as told:
        evaluate(tmp_path / "out", replace(small(), sample=returning(images)))
    assert (told.value.where, told.value.got) == ("sample", got)


class Result(nn.Module):
    """Returns the same, whatever it is given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


@pytest.mark.parametrize("name", ["features", "logits"])
@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.zeros(2), "(2,)"), (torch.full((2, 3), torch.nan), "6 that are not")],
)
def test_a_network_that_returns_no_rows_of_numbers_is_refused(
    name: str, value: Tensor, got: str, tmp_path: Path
) -> None:
    with pytest.raises(EvaluateError) as told:
        evaluate(tmp_path / "out", replace(small(), **{name: Result(value).eval()}))
    assert (told.value.where, told.value.got) == (name, got)


def test_modules_in_training_mode_are_refused() -> None:
    with pytest.raises(EvaluateError) as told:
        load_subject(f"{SPEC}:in_training")
    assert (told.value.where, told.value.got) == ("features", "Scores in training mode")


def test_inception_that_cannot_be_had_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fid, "_TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(EvaluateError) as told:
        evaluate(tmp_path / "out", replace(small(), features=None))
    assert told.value.where == "features"
    assert "ModuleNotFoundError" in told.value.got


def test_a_reference_of_another_size_is_refused(output: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.npz"
    np.savez(real, np.zeros((3, 4, 4, 1), np.uint8))
    with pytest.raises(EvaluateError) as told:
        evaluate(output, reference=real)
    assert "(4, 4, 1)" in told.value.expected
    assert told.value.got == "images (5, 4, 1)"


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    def sample(_: nn.Module, seeds: Sequence[int]) -> Tensor:
        return torch.zeros(len(seeds), 5, 4 * (1 + seeds[0] // 2), 1, dtype=torch.uint8)

    subject = replace(small(), sample=sample, features=MeanLevel().eval(), logits=None)
    with pytest.raises(EvaluateError) as told:
        evaluate(tmp_path / "out", subject)
    assert told.value.where.endswith("full-00001.safetensors")
    assert told.value.got == "images (5, 8, 1)"


class MeanLevel(nn.Module):
    """One feature of images of any size."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


@pytest.mark.parametrize(
    ("arrays", "got"),
    [
        ({"arr_0": np.zeros((3, *SIZE))}, "float64 (3, 5, 4, 1)"),
        ({"arr_0": np.zeros((3, 5, 4), np.uint8)}, "uint8 (3, 5, 4)"),
        ({"arr_0": np.zeros((1, *SIZE), np.uint8)}, "uint8 (1, 5, 4, 1)"),
        ({"arr_0": np.asfortranarray(np.zeros((3, 5, 4, 3), np.uint8))}, "Fortran"),
        ({"arr_0": np.array([{}])}, "object"),
        ({"images": np.zeros((3, *SIZE), np.uint8)}, "arr_0"),
    ],
)
def test_an_npz_file_with_something_else_is_refused(
    arrays: dict[str, np.ndarray], got: str, tmp_path: Path
) -> None:
    np.savez(tmp_path / "real.npz", **arrays)
    with pytest.raises(EvaluateError) as told:
        NpzImages.open(tmp_path / "real.npz")
    assert got in told.value.got


def test_an_npz_file_that_is_cut_or_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    write_npz(path, (3, *SIZE), [torch.zeros(2, *SIZE, dtype=torch.uint8)])
    with pytest.raises(EvaluateError, match="40 bytes"):
        NpzImages.open(path)
    path.write_text("a picture")
    with pytest.raises(EvaluateError, match="BadZipFile"):
        NpzImages.open(path)
    with pytest.raises(EvaluateError, match="nothing else is replaced"):
        write_npz(path, (0, *SIZE), [])


def test_npz_files_are_the_same_bytes_and_read_in_batches(tmp_path: Path) -> None:
    images = torch.arange(100, dtype=torch.uint8).reshape(5, *SIZE)
    for name, parts in (("one", images.split(2)), ("other", images.split(5))):  # type: ignore[no-untyped-call]
        write_npz(tmp_path / f"{name}.npz", tuple(images.shape), parts)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "other.npz").read_bytes()
    batches = list(NpzImages.open(tmp_path / "one.npz").batches(3))
    assert [len(batch) for batch in batches] == [3, 2]
    assert torch.equal(torch.cat(batches), images)
