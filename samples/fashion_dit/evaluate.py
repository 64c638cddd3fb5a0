"""Measure every method on the trained sample model; goes on where it stopped.

    python samples/fashion_dit/evaluate.py

Writes `fidelity.json` and, from it, docs/fidelity.md and docs/fidelity.png. Statistics, the
choice of a schedule and the report use different seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fidelity_report import write_report
from methods import STEPS, Method, computed_steps, methods
from model import FashionDiT
from safetensors.torch import load_file
from scores import SetScores, distance, sample_errors
from torch import Tensor, nn
from tqdm import tqdm
from weights import DIT_WEIGHTS, load_weights, save_atomic

from calicache import Plan, Recording, Session, export_onnx, optimize, record
from calicache.graph_passes import uniform_schedule
from calicache.graph_passes.common.environment import environment

BATCH = 32
RECORD_SEED, CHOICE_SEED, REPORT_SEED = 1, 2, 1000
SEARCH_SEEDS = (11, 12, 13)
REFERENCE_STEPS, REFERENCE_IMAGES = 500, 256


@dataclass(frozen=True, slots=True)
class Settings:
    """How much to measure, and where to keep what is done."""

    images: int
    repeats: int
    out: Path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2048, help="images of every method")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of every method")
    parser.add_argument("--out", type=Path, default=Path("out/fidelity"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    settings = Settings(arguments.images, arguments.repeats, arguments.out)
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    recording = record_runs(model, [RECORD_SEED])
    rows = methods(recorded_outputs(model, recording))
    searched = record_runs(model, SEARCH_SEEDS)
    for method in tqdm(rows, desc="plan and export"):
        prepare(method, model, searched if method.searched else recording, settings.out)
    fine = reference(settings.out, rows[0])
    scores = SetScores()
    for method in tqdm(rows, desc="sample and score"):
        measure(method, scores, fine, settings)
    seconds = measure_times(rows, settings)
    result = collect(rows, seconds, settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "fidelity.json").write_text(json.dumps(result, indent=2) + "\n")
    write_report(result, arguments.docs)


def record_runs(model: nn.Module, seeds: Sequence[int]) -> Recording:
    """One batch of the full sampler for every seed."""
    with record(model) as recording:
        for seed in seeds:
            recording.finish(Method("full", "recorded").sample(model, *draw(seed)))
    return recording


def recorded_outputs(model: nn.Module, recording: Recording) -> Tensor:
    """What the model returned in one recorded run, (STEPS, 2 B, 1, 28, 28)."""
    with torch.no_grad():
        return torch.stack([model(**call) for call in recording.calls])


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Noise (B, 1, 28, 28) and labels (B,), every class in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, 1, 28, 28, generator=generator), torch.arange(BATCH) % 10


def prepare(method: Method, model: nn.Module, recording: Recording, out: Path) -> None:
    """Choose the schedule, optimise, export; plain methods share one artifact."""
    if artifact(method, out).exists():
        return
    if method.searched:
        plan = search(method, model, recording, out)
    elif method.plain:
        plan = Plan.from_trajectory(
            model, recording, schedule=uniform_schedule(STEPS, 1), rank=1, correct=False
        )
    else:
        plans = [
            Plan.from_trajectory(
                model, recording, schedule=schedule, **{"rank": 1, **method.options}
            )
            for schedule in method.schedules or ()
        ]
        plan = plans[0] if len(plans) == 1 else choose(method, model, plans)
    export_onnx(optimize(model, plan), artifact(method, out))


def search(method: Method, model: nn.Module, recording: Recording, out: Path) -> Plan:
    """A plan for the method's budget or error, and beside it how long the search took."""
    start = time.perf_counter()
    Method("full", "timed").sample(model, *draw(RECORD_SEED))
    full = time.perf_counter() - start
    plan = Plan.search(model, recording, budget=method.budget, max_error=method.max_error)
    seconds = time.perf_counter() - start - full
    out.mkdir(parents=True, exist_ok=True)
    facts = {"search_runs": seconds / full, "held_out": asdict(plan.front.held_out)}
    (out / f"{method.key}.search.json").write_text(json.dumps(facts))
    return plan


def choose(method: Method, model: nn.Module, plans: Sequence[Plan]) -> Plan:
    """The plan with the smallest error on the seeds for choosing."""
    seeds = draw(CHOICE_SEED)
    full = method.sample(model, *seeds)
    errors = [float((method.sample(optimize(model, plan), *seeds) - full).norm()) for plan in plans]
    return plans[errors.index(min(errors))]


def artifact(method: Method, out: Path) -> Path:
    """Where the method's artifact is."""
    return out / f"{'plain' if method.plain else method.key}.onnx.d"


def sample(method: Method, session: Session, seed: int) -> Tensor:
    """One batch of images (B, 1, 28, 28) in ONNX Runtime."""
    calls = iter(method.calls)

    def model(**inputs: Tensor) -> Tensor:
        step = next(calls)
        return torch.from_numpy(session.step(step % STEPS, **inputs))

    return method.sample(model, *draw(seed))


def reference(out: Path, full: Method) -> Tensor:
    """Images of a 500-step run, (256, 1, 28, 28); made once."""
    path = out / "reference.safetensors"
    if not path.exists():
        fine = Method("reference", f"{REFERENCE_STEPS} steps", steps=REFERENCE_STEPS)
        session = Session(artifact(full, out))
        batches = range(REFERENCE_IMAGES // BATCH)
        images = [sample(fine, session, REPORT_SEED + k) for k in tqdm(batches, desc="reference")]
        save_atomic({"images": torch.cat(images)}, path)
    return load_file(path)["images"]


def measure(method: Method, scores: SetScores, fine: Tensor, settings: Settings) -> None:
    """Sample the method's images and keep its scores; of the full run, the first images too."""
    path, exact = settings.out / f"{method.key}.json", settings.out / "full.safetensors"
    if path.exists() and json.loads(path.read_text())["images"] == settings.images:
        return
    session = Session(artifact(method, settings.out))
    images = [sample(method, session, REPORT_SEED + k) for k in range(settings.images // BATCH)]
    fid, inception = scores.score(images)
    first = torch.cat(images)[:REFERENCE_IMAGES]
    if method.family == "full":
        save_atomic({"images": first}, exact)
    result = {
        "to_full": asdict(distance(first, load_file(exact)["images"])),
        "to_reference": asdict(distance(first, fine[: len(first)])),
        "images": settings.images,
        "fid": fid,
        "inception": inception,
    }
    if method.max_error is not None:
        off = sample_errors(first, load_file(exact)["images"])
        result["kept"] = float((off <= method.max_error).double().mean())
    path.write_text(json.dumps(result))


def measure_times(rows: Sequence[Method], settings: Settings) -> dict[str, float]:
    """Median seconds of one batch by method, all methods in turn."""
    seconds: dict[str, list[float]] = {method.key: [] for method in rows}
    sessions = {method.key: Session(artifact(method, settings.out)) for method in rows}
    for repeat in tqdm(range(settings.repeats + 1), desc="time"):
        for method in rows:
            start = time.perf_counter()
            sample(method, sessions[method.key], REPORT_SEED)
            if repeat:  # the first round warms up
                seconds[method.key].append(time.perf_counter() - start)
            sessions[method.key].reset()
    return {key: statistics.median(values) for key, values in seconds.items()}


def collect(rows: Sequence[Method], seconds: dict[str, float], settings: Settings) -> dict:
    """Everything that the report shows, as plain data."""
    full = seconds[rows[0].key]
    table = []
    for method in rows:
        manifest = Session(artifact(method, settings.out)).manifest
        if method.plain:
            macs = len(method.calls) / STEPS
            marks = list(method.calls)
        else:
            macs = manifest.run_share
            marks = computed_steps(manifest.schedule)
        table.append(
            {
                "family": method.family,
                "budget": method.budget,
                "name": method.name,
                "refreshes": len(marks),
                "schedule": marks,
                "macs_share": macs,
                "time_share": seconds[method.key] / full,
                "seconds": seconds[method.key],
                **json.loads((settings.out / f"{method.key}.json").read_text()),
                **_search_facts(settings.out / f"{method.key}.search.json"),
            }
        )
    return {**environment(), "rows": table}


def _search_facts(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
