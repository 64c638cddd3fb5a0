"""A whole evaluation: figures by another way, several processes, kills at any point."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.small import evaluation
from support.small.subjects import small_folder
from support.torchrun import SAMPLES, SECONDS, TESTS, torchrun
from typer.testing import CliRunner

from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.settings.student import student_quantile
from calicache.tools.cli import app
from calicache.tools.evaluate.evaluation import EVALUATION, FIGURES, Evaluation, Reference

SPEC = f"{Path(evaluation.__file__)}:small"
COUNT, SHARD = 24, 4
SHARDS = 2 * COUNT // SHARD
# Sums of 24 numbers in float64, and square roots of eigenvalues: far above their rounding.
CLOSE = {"rtol": 1e-6, "atol": 1e-9}


def arguments(output: Path, reference: Path) -> list[str]:
    sizes = ("--samples", str(COUNT), "--shard", str(SHARD), "--batch", "2")
    folder = small_folder() / "plan"
    return ["evaluate", SPEC, str(folder), "-o", str(output), *sizes, "--reference", str(reference)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "real.npz"
    images = np.random.default_rng(3).integers(0, 256, (130, *evaluation.SIZE), dtype=np.uint8)
    np.savez_compressed(path, images)
    return path


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """Of one process that nothing stopped."""
    folder = tmp_path_factory.mktemp("evaluation") / "one"
    done = CliRunner().invoke(app, arguments(folder, reference))
    assert done.exit_code == 0, done.output
    assert all(f" {name}" in done.output for name in FIGURES.values())
    return folder


@pytest.fixture(scope="module")
def result(output: Path) -> Evaluation:
    return EVALUATION.read(output / "evaluation.json")


def images_of(output: Path, run: str) -> np.ndarray:
    with np.load(output / f"{run}.npz") as archive:
        assert archive.files == ["arr_0"]
        return archive["arr_0"]


def network(images: np.ndarray, width: int, seed: int) -> np.ndarray:
    weight = evaluation.Scores(width, seed).layer.weight.detach().double().numpy()
    return np.tanh((images.reshape(-1, 20) / 128 - 1) @ weight.T)


def frechet(real: np.ndarray, fake: np.ndarray) -> float:
    """FID from its formula, with a root of the symmetric product."""
    a, b = network(real, 6, 1), network(fake, 6, 1)
    values, vectors = np.linalg.eigh(np.cov(a.T))
    root = (vectors * np.sqrt(values)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ np.cov(b.T) @ root)).sum()
    trace = np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + trace - 2 * cross)


def inception(images: np.ndarray) -> float:
    chances = np.exp(network(images, 3, 2))
    chances /= chances.sum(1, keepdims=True)
    return float(np.exp((chances * np.log(chances / chances.mean(0))).sum(1).mean()))


def psnr(images: np.ndarray, other: np.ndarray) -> float:
    error = ((images.astype(float) - other) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / error[error > 0])).mean())


def expected(full: np.ndarray, plan: np.ndarray, real: np.ndarray) -> dict[str, float]:
    fid = {"full": frechet(real, full), "plan": frechet(real, plan)}
    score = {"full": inception(full), "plan": inception(plan)}
    return {
        "fid_full": fid["full"],
        "fid_plan": fid["plan"],
        "fid_difference": fid["plan"] - fid["full"],
        "fid_between": frechet(full, plan),
        "is_full": score["full"],
        "is_plan": score["plan"],
        "is_difference": score["plan"] - score["full"],
        "psnr": psnr(plan, full),
    }


def test_npz_files_have_every_seed_in_the_layout_of_adm(output: Path) -> None:
    subject = evaluation.small()
    full = np.concatenate(
        [subject.sample(subject.model, range(k, k + 2)).numpy() for k in range(0, COUNT, 2)]
    )
    images = {run: images_of(output, run) for run in ("full", "plan")}
    assert all(
        i.dtype == np.uint8 and i.shape == (COUNT, *evaluation.SIZE) for i in images.values()
    )
    np.testing.assert_array_equal(images["full"], full)
    assert (images["plan"] != images["full"]).any()


def test_figures_are_those_of_their_formulas(
    output: Path, result: Evaluation, reference: Path
) -> None:
    full, plan = images_of(output, "full"), images_of(output, "plan")
    real = np.load(reference)["arr_0"]
    wanted = expected(full, plan, real)
    assert list(result.figures) == list(FIGURES) == list(wanted)
    # The networks of the evaluation are in float32: 1e-7 of features, more of their distance.
    for name, value in wanted.items():
        np.testing.assert_allclose(result.figures[name].value, value, rtol=1e-4, atol=1e-6)
    assert result.equal_images == int((full == plan).all((1, 2, 3)).sum())
    assert (result.samples, result.shard) == (COUNT, SHARD)
    assert result.reference == Reference(130, sha256_of(reference))


def test_intervals_are_those_of_the_jackknife(
    output: Path, result: Evaluation, reference: Path
) -> None:
    full, plan = images_of(output, "full"), images_of(output, "plan")
    real, shards = np.load(reference)["arr_0"], COUNT // SHARD
    left = [
        expected(*(np.delete(images, range(k, k + SHARD), 0) for images in (full, plan)), real)
        for k in range(0, COUNT, SHARD)
    ]
    for name, figure in result.figures.items():
        values = np.array([one[name] for one in left])
        error = np.sqrt((shards - 1) / shards * ((values - values.mean()) ** 2).sum())
        # As above; differences of figures have lost digits.
        np.testing.assert_allclose(figure.error, error, rtol=1e-3, atol=1e-6)
        reach = student_quantile(0.975, shards - 1) * figure.error
        ends = (figure.value - reach, figure.value + reach)
        np.testing.assert_allclose((figure.low, figure.high), ends, rtol=1e-12)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """Of two processes that are killed at work, and of two that go on with what they left."""
    folder = tmp_path_factory.mktemp("evaluation") / "stopped"
    kill_after(SHARDS // 3, arguments(folder, reference), folder)
    before = shards_of(folder)
    assert SHARDS // 3 <= len(before) < SHARDS
    done = torchrun("-m", "calicache", *arguments(folder, reference))
    assert done.stdout.count("PSNR") == 1  # one process tells
    after = shards_of(folder)
    assert {name: after[name] for name in before} == before
    return folder


def shards_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard."""
    files = (folder / "shards").glob("*.safetensors")
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def kill_after(count: int, command: list[str], folder: Path) -> None:
    """Start it in two processes, and kill all of them when there are so many shards."""
    paths = os.pathsep.join(map(str, (TESTS, SAMPLES, SAMPLES / "fashion_dit")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*start, "-m", "calicache", *command],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", evaluation.PAUSE: "0.5"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + SECONDS
    while len(shards_of(folder)) < count:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    for child in (*children(process.pid), process.pid):
        os.kill(child, signal.SIGKILL)
    process.wait()


def children(process: int) -> Iterator[int]:
    """All processes below one."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text()
    for child in map(int, listed.split()):
        yield from children(child)
        yield child


@pytest.mark.slow
def test_every_seed_is_there_once_after_kills(stopped: Path) -> None:
    files = sorted((stopped / "shards").iterdir())
    seeds = Counter(
        (file.name.split("-")[0], int(seed)) for file in files for seed in load_file(file)["seeds"]
    )
    assert seeds == Counter((run, seed) for run in ("full", "plan") for seed in range(COUNT))
    assert {file.suffix for file in files} == {".safetensors"}  # nothing is left of what was cut


@pytest.mark.slow
def test_two_processes_with_kills_give_what_one_gives(
    stopped: Path, output: Path, result: Evaluation
) -> None:
    for run in ("full", "plan"):
        assert (stopped / f"{run}.npz").read_bytes() == (output / f"{run}.npz").read_bytes()
    other = EVALUATION.read(stopped / "evaluation.json")
    assert (other.settings, other.networks) == (result.settings, result.networks)
    for name, figure in result.figures.items():
        same = other.figures[name]
        values = (figure.value, figure.low, figure.high, figure.error)
        others = (same.value, same.low, same.high, same.error)
        np.testing.assert_allclose(others, values, **CLOSE)


def test_figures_are_json_that_others_read(output: Path) -> None:
    content = json.loads((output / "evaluation.json").read_text())
    assert content["figures"].keys() == FIGURES.keys()
    assert content["environment"]["versions"]["python"]
