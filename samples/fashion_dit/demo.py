"""The whole path on the trained sample model: record, plan, optimise, export, sample, compare.

    python samples/fashion_dit/demo.py

Writes `out/demo.png` (a row for every method; same seeds, same labels),
`out/demo.json` and the ONNX artifacts, and prints a table. The searched plan is the one that ships
with the sample (`search_plan.py`); statistics of the others come from other seeds than the images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from data import CLASS_NAMES
from diffusion import GuidedDDIM
from images import save_grid
from model import FashionDiT
from rich import progress as bars
from rich.console import Console
from rich.table import Table
from search_plan import PLAN_FOLDER
from torch import Tensor, nn
from weights import DIT_WEIGHTS, load_weights

from calicache import OptimizedModel, Plan, Session, StepMode, export_onnx, optimize, record
from calicache.graph_passes import uniform_schedule
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.progress import Progress

GUIDANCE = 1.5
RECORD_SEED, SAMPLE_SEED = 1, 2
SEARCHED = "searched"
WARM_STEPS = 2


@dataclass(frozen=True, slots=True)
class Method:
    """One way to sample: an artifact, and how many of its steps to run."""

    name: str
    session: Session
    steps: int

    @property
    def macs_share(self) -> float:
        """MACs of its run against the full one's."""
        manifest = self.session.manifest
        used = sum(manifest.mode(mode).macs for mode in manifest.schedule[: self.steps])
        return used / (len(manifest.schedule) * manifest.plain_macs)


@dataclass(slots=True)
class Clock:
    """Where the demo's time goes: seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; shares and errors are against the full run."""

    name: str
    steps: int
    macs_share: float
    seconds: float
    time_share: float
    relative_error: float

    @property
    def label(self) -> str:
        """What the picture says of it."""
        if self.relative_error == 0.0:
            return self.name
        return f"{self.name}\n{self.time_share:.2f} of the time\nerror {self.relative_error:.3f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=35, help="DDIM steps of the full run")
    parser.add_argument("--interval", type=int, default=3, help="steps from REFRESH to REFRESH")
    parser.add_argument("--rank", type=int, default=32, help="rank of the calibration branches")
    parser.add_argument("--weighting", default="covariance")
    parser.add_argument("--order", type=int, default=2, help="order of the forecast anchors")
    parser.add_argument("--images", type=int, default=10, help="images to sample")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of every method")
    arguments = parser.parse_args()
    console, clock = Console(), Clock()
    with bars.Progress(console=console, transient=True) as progress:
        methods = prepare(arguments, progress, clock)
        with clock.stage("sample"):
            rows, images = compare(methods, arguments.images, arguments.repeats, progress)
    console.print(table(rows), highlight=False)
    pictured = [images[row.name] for row in rows]
    save_grid(pictured, arguments.out / "demo.png", [row.label for row in rows])
    report(rows, arguments.out / "demo.json")
    labels = ", ".join(CLASS_NAMES[k % 10] for k in range(arguments.images))
    console.print(f"Columns: {labels}", highlight=False)
    console.print(f"Pictures: {arguments.out / 'demo.png'}  Look inside:", highlight=False)
    console.print(f"  calicache inspect {arguments.out / 'calibrate.onnx.d'}", highlight=False)
    console.print(f"Time: {clock}", highlight=False)


def prepare(arguments: argparse.Namespace, progress: bars.Progress, clock: Clock) -> list[Method]:
    """Record, plan, optimise and export; returns what to compare, the full run first."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    sampler = GuidedDDIM(arguments.steps, GUIDANCE, FashionDiT().null_class)
    task = progress.add_task("record one sampler run")
    with clock.stage("record"), record(model) as recording:
        recording.finish(sampler.sample(model, *draw(arguments.images, RECORD_SEED)))
    progress.update(task, completed=100)
    schedules = {"full": uniform_schedule(arguments.steps, 1)} | {
        mode.name: uniform_schedule(arguments.steps, arguments.interval, mode)
        for mode in (StepMode.REUSE, StepMode.FORECAST, StepMode.CALIBRATE)
    }
    sessions: dict[str, Session] = {}
    export = progress.add_task("plan, optimise and export", total=len(schedules))
    workspace = None
    for name, schedule in schedules.items():
        with clock.stage("plan"):
            plan = Plan.from_trajectory(
                model,
                recording,
                schedule=schedule,
                rank=arguments.rank,
                order=arguments.order,
                weighting=arguments.weighting,
                correct=name != "full",
                workspace=workspace,
                on_progress=tick(progress, f"plan {name}"),
            )
        workspace = plan.workspace  # all four have the same graph and the same decompositions
        with clock.stage("optimise"):
            fast = optimize(model, plan, on_progress=tick(progress, f"optimise {name}"))
        sessions[name] = exported(fast, arguments.out / f"{name.lower()}.onnx.d", clock)
        progress.advance(export)
    searched = export_searched(model, arguments, clock)
    if searched is not None:
        sessions[SEARCHED] = searched
    steps = arguments.steps
    methods = {name: Method(name, session, steps) for name, session in sessions.items()}
    fewer = max(2, round(steps * methods["CALIBRATE"].macs_share))
    return [
        methods["full"],
        Method(f"full, {fewer} steps", sessions["full"], fewer),
        methods["REUSE"],
        methods["FORECAST"],
        methods["CALIBRATE"],
        *([methods[SEARCHED]] if SEARCHED in methods else []),
    ]


def exported(fast: OptimizedModel, folder: Path, clock: Clock) -> Session:
    """A session of the artifact that is written there."""
    with clock.stage("export"):
        export_onnx(fast, folder)
    with clock.stage("open"):
        return Session(folder)


def export_searched(
    model: nn.Module, arguments: argparse.Namespace, clock: Clock
) -> Session | None:
    """The plan that ships with the sample, exported; None for another number of steps."""
    plan = Plan.load(PLAN_FOLDER)
    if len(plan.schedule) != arguments.steps:
        return None
    noise, labels = draw(arguments.images, RECORD_SEED)
    with clock.stage("optimise"):
        fast = optimize(model, plan).for_call(
            hidden_states=torch.cat([noise, noise]),
            timestep=torch.full((2 * arguments.images,), 999),
            class_labels=torch.cat([labels, labels]),
        )
    return exported(fast, arguments.out / f"{SEARCHED}.onnx.d", clock)


def compare(
    methods: list[Method], images: int, repeats: int, progress: bars.Progress
) -> tuple[list[Row], dict[str, Tensor]]:
    """Time the methods in turn, so that a change of the machine's speed meets all of them."""
    noise, labels = draw(images, SAMPLE_SEED)
    seconds: dict[str, list[float]] = {method.name: [] for method in methods}
    results: dict[str, Tensor] = {}
    task = progress.add_task("sample with ONNX Runtime", total=repeats * len(methods))
    for method in methods:  # the first steps of a session take longer
        sample(replace(method, steps=WARM_STEPS), noise, labels)
    for _ in range(repeats):
        for method in methods:
            start = time.perf_counter()
            results[method.name] = sample(method, noise, labels)
            seconds[method.name].append(time.perf_counter() - start)
            progress.advance(task)
    full = methods[0].name
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        Row(
            name=method.name,
            steps=method.steps,
            macs_share=method.macs_share,
            seconds=medians[method.name],
            time_share=medians[method.name] / medians[full],
            relative_error=float(
                (results[method.name] - results[full]).norm() / results[full].norm()
            ),
        )
        for method in methods
    ]
    return rows, results


def sample(method: Method, noise: Tensor, labels: Tensor) -> Tensor:
    """Run the sampler over an ONNX Runtime session; images (B, 1, 28, 28)."""
    step = iter(range(method.steps))

    def model(**inputs: Tensor) -> Tensor:
        return torch.from_numpy(method.session.step(next(step), **inputs))

    return GuidedDDIM(method.steps, GUIDANCE, FashionDiT().null_class).sample(model, noise, labels)


def draw(images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (B, 1, 28, 28) and labels (B,), every class in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 1, 28, 28, generator=generator), torch.arange(images) % 10


def tick(progress: bars.Progress, title: str) -> Callable[[Progress], None]:
    """A callback that draws a bar from its first call on."""
    task = progress.add_task(title, visible=False)

    def update(now: Progress) -> None:
        progress.update(task, completed=now.done, total=now.total, visible=True)

    return update


def table(rows: list[Row]) -> Table:
    """The comparison, for a terminal."""
    title = f"{rows[0].steps}-step DDIM with guidance {GUIDANCE}, ONNX Runtime on the CPU"
    result = Table(title=title, title_justify="left")
    for column in ("method", "steps", "MACs", "seconds", "of full", "relative L2 error"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        result.add_row(
            row.name,
            str(row.steps),
            f"{row.macs_share:.3f}",
            f"{row.seconds:.3f}",
            f"{row.time_share:.3f}",
            f"{row.relative_error:.4f}",
        )
    return result


def report(rows: list[Row], path: Path) -> None:
    """The same numbers as JSON, with the machine and the versions they were measured on."""
    content = {**environment(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
