"""Build the page into a folder that any static server can serve; `make browser`.

    python samples/browser/build_page.py

Exports the full run and the plan that ships with the Fashion DiT at batch 1, layout `step`. Both
graphs read one file of weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "fashion_dit"))

from data import CLASS_NAMES
from diffusion import TRAIN_STEPS, GuidedDDIM, alpha_bar_table, ddim_timesteps
from model import FashionDiT
from search_plan import GUIDANCE, PLAN_FOLDER, STEPS
from weights import DIT_WEIGHTS, load_weights

from calicache import OptimizedModel, Plan, export_onnx, optimize, record
from calicache.export.artifact.manifest import MODEL_FILE, WEIGHTS_FILE, Manifest
from calicache.export.artifact.weights import place_outside, plan_weight_file, same_content
from calicache.graph_passes.rewriting.insertion import slot_name

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
# Without a graphics processor, and with one: what a visitor's browser loads is one of the two.
RUNTIME_FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """An artifact: its graph in memory, its manifest."""

    model: ir.Model
    manifest: Manifest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/browser"))
    build(parser.parse_args().out)


def build(out: Path) -> None:
    """Write page, runtime, graphs, weights and `runs.json`."""
    shutil.copytree(HERE / "page", out, dirs_exist_ok=True)
    for module, binary in RUNTIME_FILES.values():
        for name in (module, f"{binary}.mjs", f"{binary}.wasm"):
            (out / "ort").mkdir(exist_ok=True)
            shutil.copyfile(RUNTIME / name, out / "ort" / name)
    full, searched = optimized_models()
    artifacts = {"full": full, "searched": searched}
    exported = {name: export(model, out / f"{name}.onnx.d") for name, model in artifacts.items()}
    share_weights(exported, out)
    (out / "runs.json").write_text(json.dumps(description(exported, out), indent=1) + "\n")


def optimized_models() -> tuple[OptimizedModel, OptimizedModel]:
    """The full run and the searched plan, both for one image."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    sampler = GuidedDDIM(STEPS, GUIDANCE, model.null_class)
    noise = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with record(model) as recording:
        recording.finish(sampler.sample(model, noise, torch.tensor([0])))
    # Not corrected: this is the run that the other is measured against.
    plain = Plan.from_trajectory(model, recording, schedule=1, correct=False)
    fast = optimize(model, Plan.load(PLAN_FOLDER)).for_call(
        hidden_states=torch.cat([noise, noise]),
        timestep=torch.full((2,), TRAIN_STEPS - 1),
        class_labels=torch.tensor([0, model.null_class]),
    )
    return optimize(model, plain), fast


def export(optimized: OptimizedModel, folder: Path) -> Exported:
    """An artifact in the layout `step`: the page shows what every step makes."""
    manifest = export_onnx(optimized, folder, attention="standard")
    model = ir.load(folder / MODEL_FILE)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):  # its folder will go
            value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
    shutil.rmtree(folder)
    return Exported(model, manifest)


def share_weights(exported: dict[str, Exported], out: Path) -> None:
    """Write the graphs beside one file with the weights of all of them."""
    models = [artifact.model for artifact in exported.values()]
    weights = plan_weight_file(models)
    for model in models:
        for name, value in model.graph.initializers.items():
            if name in weights.tensors:
                assert same_content(value.const_value, weights.tensors[name]), name
    weights.write(out / WEIGHTS_FILE)
    place_outside(models, weights, out / WEIGHTS_FILE)
    for name, artifact in exported.items():
        ir.save(artifact.model, out / f"{name}.onnx")


def description(exported: dict[str, Exported], out: Path) -> dict[str, Any]:
    """What the page has to know, as JSON; sizes are for the bar of the download."""
    binaries = {f"ort/{binary}.wasm" for _, binary in RUNTIME_FILES.values()}
    timesteps = ddim_timesteps(STEPS)
    files = {*binaries, WEIGHTS_FILE, *(f"{name}.onnx" for name in exported)}
    return {
        "classes": CLASS_NAMES,
        "nullClass": FashionDiT().null_class,
        "guidance": GUIDANCE,
        "timesteps": timesteps,
        "alphaBars": [*alpha_bar_table()[timesteps].tolist(), 1.0],  # the image has no noise
        "runtime": {
            name: {"module": module, "binary": f"{binary}.wasm"}
            for name, (module, binary) in RUNTIME_FILES.items()
        },
        "sizes": {name: (out / name).stat().st_size for name in sorted(files)},
        "runs": {name: run(artifact.manifest) for name, artifact in exported.items()},
    }


def run(manifest: Manifest) -> dict[str, Any]:
    """A run: MACs, mode and what is written by step, and kept values by cache, the newest first."""
    return {
        "modes": [mode.name for mode in manifest.schedule],
        "macs": [manifest.mode(mode).macs for mode in manifest.schedule],
        "writes": [manifest.mode(mode).writes for mode in manifest.schedule],
        "output": manifest.outputs[0],
        "caches": [
            {
                "shape": cache.shape,
                "kept": [slot_name(cache.name, back) for back in range(manifest.history)],
            }
            for cache in manifest.caches
        ],
    }


if __name__ == "__main__":
    main()
