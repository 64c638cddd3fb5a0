"""Files run in the oldest ONNX Runtimes that docs/deploy.md promises, which hold nothing else."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from diffusion import GuidedDDIM
from model import FashionDiT
from weights import DIT_WEIGHTS, load_weights

from calicache.export import Layout, export_onnx
from calicache.graph_passes import OptimizedModel, Plan, optimize, record

HOMES = Path(__file__).parents[2] / ".oldest"  # from `make oldest`
NEEDED = pytest.mark.skipif(not HOMES.exists(), reason="`make oldest` installs these runtimes")
pytestmark = [pytest.mark.slow, NEEDED]

# One run of every model of a folder, in any version: names of the outputs with their values.
RUN = """
import json, sys
from pathlib import Path
import numpy as np
import onnxruntime as ort

folder = Path(sys.argv[1])
given, results = np.load(folder / "given.npz"), {}
for path in sorted(folder.glob("*.onnx")):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {value.name: given[f"{path.name}:{value.name}"] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    results.update({f"{path.name}:{n}": v for n, v in zip(names, session.run(names, feed))})
np.savez(folder / "results.npz", **results)
print(json.dumps(ort.__version__))
"""
ELEMENTS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


def planned(dtype: torch.dtype, *, correct: bool = False) -> OptimizedModel:
    """The sample in four modes; its sampler is known where output weights are fitted to it."""
    dit = load_weights(FashionDiT(), DIT_WEIGHTS).to(dtype)
    noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(1)).to(dtype)
    with record(dit) as recording:
        latents = GuidedDDIM(6, 1.5, dit.null_class).sample(dit, noise, torch.tensor([0]))
        recording.finish(latents)
    plan = Plan.from_trajectory(dit, recording, schedule="RCUFRC", rank=8, order=1, correct=correct)
    return optimize(dit, plan)


@pytest.fixture(scope="module")
def fast() -> OptimizedModel:
    return planned(torch.float32)


def worst_difference(folder: Path, python: str) -> tuple[str, float]:
    """The version that runs a folder's models there, and by how much the results differ."""
    given, expected, draw = {}, {}, np.random.default_rng(0)
    for path in sorted(folder.glob("*.onnx")):
        session, feed = ort.InferenceSession(path), {}
        for value in session.get_inputs():
            kind = ELEMENTS[value.type]
            drawn = draw.standard_normal(value.shape) if kind != np.int64 else np.ones(value.shape)
            feed[value.name] = given[f"{path.name}:{value.name}"] = drawn.astype(kind)
        names = [value.name for value in session.get_outputs()]
        results = zip(names, session.run(names, feed), strict=True)
        expected |= {f"{path.name}:{name}": value for name, value in results}
    np.savez(folder / "given.npz", **given)
    interpreter = HOMES / python / "bin" / "python"
    told = subprocess.run([interpreter, "-c", RUN, folder], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    got = np.load(folder / "results.npz")
    assert set(got) == set(expected)
    errors = [relative(got[name], value) for name, value in expected.items()]
    return json.loads(told.stdout), max(errors)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    difference = np.linalg.norm(got.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), 1e-12))


@pytest.mark.parametrize("layout", ["step", "pair"])
@pytest.mark.parametrize("attention", ["fused", "standard"])
def test_float32_runs_in_the_oldest(layout: str, attention: str, fast, tmp_path) -> None:
    export_onnx(fast, tmp_path / "d", layout=layout, attention=attention)
    number, error = worst_difference(tmp_path / "d", "float32")
    assert number.startswith("1.18.")
    assert error < 1e-5  # float32 in another order, some layers deep


def test_a_whole_run_runs_in_the_oldest(tmp_path) -> None:
    export_onnx(planned(torch.float32, correct=True), tmp_path / "d", layout=Layout.SAMPLER)
    _, error = worst_difference(tmp_path / "d", "float32")
    assert error < 1e-4  # the same over a run


def test_float16_runs_in_the_oldest_for_it(tmp_path) -> None:
    export_onnx(planned(torch.float16), tmp_path / "d", layout="pair")
    number, error = worst_difference(tmp_path / "d", "float16")
    assert number.startswith("1.20.")
    assert error < 1e-3  # 11 bits


@pytest.mark.parametrize("precision", ["float16", "int8", "weights4"])
def test_fewer_bits_run_in_the_oldest(precision: str, fast, tmp_path) -> None:
    export_onnx(fast, tmp_path / "d", layout="pair", precision=precision)
    _, error = worst_difference(tmp_path / "d", "float32")
    assert error < 0.02  # a level more or less of 8 bits: another rounding of the same product
