"""The samples in other languages run the `sampler` layout, and their images are Python's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from support.artifacts import shared_artifact
from whole_run import export_run

from calicache.export import Session

pytestmark = pytest.mark.slow

SAMPLES = Path(__file__).parents[2] / "samples"
LABELS = np.array([*range(10), *[10] * 10])
ELEMENTS = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}


@pytest.fixture(scope="module")
def artifact() -> Path:
    return shared_artifact("run.onnx.d", export_run)


def succeeded(command: Sequence[str | Path], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_images(artifact: Path, written: Path) -> None:
    """The images that a program wrote are what a session makes of the noise beside them."""
    noise = np.fromfile(written / "noise.f32", "<f4").reshape(10, 1, 28, 28)
    assert abs(noise.mean()) < 0.05  # of 7,840 standard normal numbers: 0.011 is usual
    assert abs(noise.std() - 1) < 0.05
    expected = Session(artifact).sample(noise, class_labels=LABELS)
    latents = np.fromfile(written / "latents.f32", "<f4").reshape(expected.shape)
    # The same graph in two builds of ONNX Runtime, in float32.
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)


def test_node(artifact: Path, tmp_path: Path) -> None:
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    if not (SAMPLES / "node/node_modules/onnxruntime-node").is_dir():
        pytest.skip("onnxruntime-node is not installed: make packages")
    succeeded(["node", SAMPLES / "node/sample.mjs", artifact], tmp_path)
    check_images(artifact, tmp_path)


def test_node_sample_names_what_the_model_takes(artifact: Path) -> None:
    """Where node is not there, the text at least fits the artifact."""
    text = (SAMPLES / "node/sample.mjs").read_text()
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    fed = re.findall(r'^  (\w+): new ort\.Tensor\("(\w+)"', text, re.MULTILINE)
    assert {name: ELEMENTS[kind] for name, kind in fed} == {
        value.name: value.type.tensor_type.elem_type for value in graph.input
    }
    (output,) = re.findall(r"const \{ (\w+) \} = await session\.run", text)
    assert [output] == [value.name for value in graph.output]
    sampler = json.loads((artifact / "manifest.json").read_text())["sampler"]
    (read,) = re.findall(r"const \{ ([\w, ]+) \} = JSON\.parse", text)
    assert set(read.split(", ")) <= set(sampler)


def test_cpp(artifact: Path, tmp_path: Path) -> None:
    found = "ONNXRUNTIME" in os.environ or (
        shutil.which("pkg-config")
        and not subprocess.run(["pkg-config", "--exists", "libonnxruntime"]).returncode
    )
    if not (shutil.which("g++") and shutil.which("make")):
        pytest.skip("g++ and make are not installed")
    if not found:
        pytest.skip("no headers of ONNX Runtime: set ONNXRUNTIME to a folder with include and lib")
    program = tmp_path / "sample"
    succeeded(["make", "-C", SAMPLES / "cpp", f"OUT={program}"], tmp_path)
    succeeded([program, artifact], tmp_path)
    check_images(artifact, tmp_path)


def test_cpp_sample_names_what_the_model_takes(artifact: Path) -> None:
    text = (SAMPLES / "cpp/sample.cpp").read_text()
    graph = onnx.load(artifact / "model.onnx", load_external_data=False).graph
    (names,) = re.findall(r"names\[\] = \{([^}]+)\}", text)
    assert [name.strip(' "') for name in names.split(",")] == [value.name for value in graph.input]
    assert graph.input[0].name == "noise"  # whose shape it reads
    assert f'output = "{graph.output[0].name}"' in text
    sampler = json.loads((artifact / "manifest.json").read_text())["sampler"]
    written = float(re.findall(r"guidance = ([\d.]+)f", text)[0])
    assert written == pytest.approx(sampler["guidance"], rel=1e-6)  # read off float32 outputs


@pytest.mark.parametrize("folder", ["browser", "node"])
def test_packages_are_pinned_without_addresses(folder: str) -> None:
    wanted = json.loads((SAMPLES / folder / "package.json").read_text())["dependencies"]
    locked = json.loads((SAMPLES / folder / "package-lock.json").read_text())["packages"]
    assert locked[""]["dependencies"] == wanted
    for name, version in wanted.items():
        assert locked[f"node_modules/{name}"]["version"] == version
    assert [name for name, entry in locked.items() if "resolved" in entry] == []
    assert all(entry["integrity"] for name, entry in locked.items() if name)
