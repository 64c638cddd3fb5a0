"""The command line: what every command takes, and what its help says.

Nothing here does the work: that is a function of the same name and arguments in the module that
`calicache.tools.cli` names for it, loaded when the command is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from calicache.tools.terminal.options import (
    ARTIFACT,
    CPU,
    KINDS,
    NPZ,
    PIPELINE,
    PLAN,
    RECORDING,
    TABLE,
    AlsoModel,
    Artifact,
    Json,
    Model,
    Order,
    Output,
    PlanFolder,
    Provider,
    Runs,
    each_there,
    function_there,
    there,
)

OUT = Path("out")
BENCH_MODELS = "dit-s, dit-b, dit-xl"


def speed_up(
    pipeline: Annotated[
        Path,
        typer.Argument(
            help="The folder of a pipeline that diffusers saved, or its model_index.json.",
            callback=there(PIPELINE),
        ),
    ],
    output: Output,
    prompt: Annotated[
        list[str], typer.Option("--prompt", help="Of a call; several make a better plan.")
    ] = [],  # noqa: B006  # read alone
    set_: Annotated[
        list[str],
        typer.Option("--set", help="NAME=VALUE of the call, such as num_inference_steps=28."),
    ] = [],  # noqa: B006
    budget: Annotated[
        float | None, typer.Option(help="Share of the plain run's seconds; 0.4 if left out.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error that new samples stay below.")
    ] = None,
    effort: Annotated[
        int, typer.Option(help="Candidates run for every one at effort 1, which is usual.")
    ] = 1,
) -> None:
    """Find the fastest plans for a pipeline on this machine, and say what they promise.

    Example: calicache speed-up pixart -o out/plans --prompt "a cat" --set num_inference_steps=20
    """


def search(
    model: Model,
    recordings: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORDING...",
            help="Three recorded runs or more, from Recording.save; one for each number of steps "
            "that the plan is to have a recipe for.",
            callback=each_there(RECORDING),
        ),
    ],
    output: Output,
    budget: Annotated[
        float | None, typer.Option(help="Share of the full run's cost, above 0 and below 1.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Relative L2 error that new samples stay below.")
    ] = None,
    latency: Annotated[
        Path | None,
        typer.Option(
            help="Count the cost in these seconds, from calicache latency.", callback=there(TABLE)
        ),
    ] = None,
    effort: Annotated[
        int, typer.Option(help="Candidates run for every one at effort 1, which is usual.")
    ] = 1,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="The same runs in many more steps, whose results the plan aims at.",
            callback=there(RECORDING),
        ),
    ] = None,
) -> None:
    """Search for the best plan under a budget, or the cheapest one under an error.

    Ctrl-C stops it; the same command goes on later.

    Example: calicache search dit.py:build runs.safetensors -o out/plan --budget 0.5

    For 20 and for 28 steps: calicache search dit.py:build 20.st 28.st -o out/plan --budget 0.5
    """


def take(
    plan: PlanFolder,
    point: Annotated[int, typer.Argument(help="Its number on the front, from the cheapest, 0.")],
    output: Output,
) -> None:
    """Save the plan of another point of a plan's front; calicache inspect prints the front.

    Example: calicache take out/plan 3 -o out/other
    """


def export(
    model: Model,
    plan: PlanFolder,
    output: Output,
    layout: Annotated[
        Literal["step", "pair", "sampler"],
        typer.Option(
            help="One model of a step, one model for every mode, or one model of a whole run."
        ),
    ] = "step",
    attention: Annotated[
        Literal["fused", "standard"],
        typer.Option(help="For ONNX Runtime on CPU and CUDA, or for every other runtime."),
    ] = "fused",
    precision: Annotated[
        Literal["float32", "float16", "int8", "weights8", "weights4"],
        typer.Option(help="Of the linear layers in residual branches."),
    ] = "float32",
    dynamic: Annotated[
        list[str],
        typer.Option("--dynamic", help="A size to leave open: batch, prompt or tokens."),
    ] = [],  # noqa: B006  # read alone
) -> None:
    """Optimise a model under a plan, and write it as an artifact for ONNX Runtime.

    Example: calicache export dit.py:build out/plan -o out/dit.onnx.d --layout sampler
    """


def latency(
    model: Model,
    recording: Annotated[
        Path,
        typer.Argument(help="A recorded run, from Recording.save.", callback=there(RECORDING)),
    ],
    output: Output,
    order: Order = 2,
    provider: Provider = CPU,
    repeats: Annotated[int, typer.Option(help="Timed steps of every kind.")] = 7,
) -> None:
    """Time the steps of a model on this machine, so that a search counts in seconds.

    Example: calicache latency dit.py:build runs.safetensors -o out/latency.json
    """


def cost(
    model: Annotated[
        str,
        typer.Argument(
            help=f"{BENCH_MODELS}; FILE.py:FUNCTION that returns a BenchModel or the model; or a "
            "folder with the config.json of a model of diffusers.",
        ),
    ],
    recording: Annotated[
        Path | None,
        typer.Option(help="Whose calls the model gets.", callback=there(RECORDING)),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Count this plan, for calls of its form.", callback=there(PLAN)),
    ] = None,
    argument: Annotated[
        list[str],
        typer.Option(
            "--input",
            help="NAME=SIZES of a tensor of the call, such as hidden_states=1x4096x64; with the "
            "dtype where it is not float32: class_labels=2:int64.",
        ),
    ] = [],  # noqa: B006  # read alone
    latent: Annotated[str, typer.Option(help="The input that is denoised.")] = "hidden_states",
    timestep: Annotated[str, typer.Option(help="The input that counts the steps.")] = "timestep",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of the weights; as they are made, or saved, if left out."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of a run.", min=5)] = 20,
    rank: Annotated[int, typer.Option(help="Of the calibration branches.")] = 128,
    order: Order = 2,
    runs: Annotated[int, typer.Option(help="Recorded, to search with.", min=3)] = 3,
    budget: Annotated[float, typer.Option(help="Of the search.")] = 0.4,
    json: Json = False,
) -> None:
    """Say what a model, planning and a search take, in bytes and calls, from shapes alone.

    No weights are read and nothing is computed: the model may be larger than this machine.

    Example: calicache cost dit-xl

    From a config alone: calicache cost wan/transformer --input hidden_states=1x16x21x60x104
    --input timestep=1 --input encoder_hidden_states=1x512x4096
    """


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="The folder of a plan or an artifact, or the file of a recording.",
            callback=there(KINDS),
        ),
    ],
    json: Json = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 2 where there are warnings.")
    ] = False,
    provider: Annotated[
        str | None,
        typer.Option(
            help="An execution provider, such as cuda: what of an artifact it leaves to the host."
        ),
    ] = None,
) -> None:
    """Print what a plan, an artifact or a recording is, and what is odd about it.

    Example: calicache inspect out/dit.onnx.d

    Exit codes: 1 for what is refused; with --strict 2 where there are warnings.
    """


def diff(
    a: Annotated[
        Path,
        typer.Argument(
            metavar="A", help="The folder of a plan or an artifact.", callback=there(KINDS)
        ),
    ],
    b: Annotated[
        Path, typer.Argument(metavar="B", help="Another of the same kind.", callback=there(KINDS))
    ],
    json: Json = False,
) -> None:
    """Print what differs between two plans, or between two artifacts, in cost and structure.

    Example: calicache diff out/plan out/other-plan

    Exit codes: 0 where they are equal, 3 where they differ, 1 for what cannot be compared.
    """


def graph(
    artifact: Artifact,
    block: Annotated[
        str | None,
        typer.Option(help="Name or number of a block; left out, the model is folded by block."),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            help="plain, or a mode of the schedule; if left out its first one that is not refresh."
        ),
    ] = None,
    form: Annotated[
        Literal["text", "svg", "mermaid", "json"],
        typer.Option("--format", help="How the graph is written."),
    ] = "text",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; printed if left out.")
    ] = None,
) -> None:
    """Show a rewritten graph beside the plain one: what was inserted, removed, read and kept.

    Example: calicache graph out/dit.onnx.d --block 3 --mode calibrate

    As a drawing: calicache graph out/dit.onnx.d --block 3 --format svg -o block.svg
    """


def report(
    path: Annotated[
        Path,
        typer.Argument(help="An artifact, or a plan.", callback=there(f"{PLAN} or {ARTIFACT}")),
    ],
    output: Output,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="Recorded runs: adds errors by step, times, pictures.", callback=there(RECORDING)
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="That the artifact was made from; goes with --model.", callback=there(PLAN)
        ),
    ] = None,
    model: AlsoModel = None,
    runs: Runs = None,
) -> None:
    """Write one HTML file that works offline: schedule, errors, costs, graphs, pictures.

    A model, with a plan and recorded runs, adds the error by branch and step.

    Example: calicache report out/dit.onnx.d -o report.html --recording runs.safetensors
    """


def compare(
    artifact: Artifact,
    recording: Annotated[
        Path,
        typer.Option(
            help="Recorded runs with their results, from Recording.save.", callback=there(RECORDING)
        ),
    ],
    runs: Runs = None,
    grid: Annotated[
        Path | None, typer.Option(help="PNG to draw: full, optimised, difference.")
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(
            help="FILE.py:FUNCTION that returns a function from latents to images "
            "(B, C, H, W) in -1 .. 1."
        ),
    ] = None,
    provider: Provider = CPU,
    json: Json = False,
) -> None:
    """Run an artifact beside the full model along recorded runs: error and time of every step.

    Example: calicache compare out/dit.onnx.d --recording runs.safetensors --grid compare.png
    """


def evaluate(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="FILE.py:FUNCTION",
            help="That returns an EvaluationModel: model, sampler, scoring networks.",
            callback=function_there,
        ),
    ],
    plan: PlanFolder,
    output: Output,
    samples: Annotated[
        int, typer.Option(help="Images of the full model, and under the plan.", min=2)
    ] = 50_000,
    shard: Annotated[int, typer.Option(help="Images of a file.", min=1)] = 500,
    batch: Annotated[int, typer.Option(help="Images sampled together.", min=1)] = 50,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="npz with real images arr_0, uint8 (M, H, W, C), for FID.", callback=there(NPZ)
        ),
    ] = None,
) -> None:
    """Sample the same seeds in full and under a plan, and measure FID, IS and PSNR.

    Example: calicache evaluate dit.py:evaluation out/plan -o out/evaluation

    In four processes: torchrun --nproc-per-node 4 -m calicache evaluate ...

    After whatever stopped it, the same command goes on: shards of images that are there stay.
    """


def bench(
    models: Annotated[
        list[str],
        typer.Argument(help=f"{BENCH_MODELS}, or FILE.py:FUNCTION that gives a BenchModel."),
    ],
    interval: Annotated[int, typer.Option(help="Steps from REFRESH to REFRESH.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 9,
    rank: Annotated[
        int | None, typer.Option(help="Of the branches; width / 9 if left out.")
    ] = None,
    order: Order = 0,
    repeats: Annotated[int, typer.Option(help="Timed runs of every row.")] = 5,
    row: Annotated[
        list[str] | None, typer.Option(help="Measure this row alone; may be given several times.")
    ] = None,
    compile_only: Annotated[
        bool, typer.Option("--compile", help="Measure what compiling takes, and nothing else.")
    ] = False,
    provider: Provider = CPU,
    work: Annotated[Path, typer.Option(help="For plans and artifacts.")] = OUT / "bench",
    docs: Annotated[Path, typer.Option(help="For performance.md and performance.json.")] = OUT,
) -> None:
    """Run a model with and without calicache, side by side, and write the figures.

    Example: calicache bench dit-s --repeats 3

    What is in performance.json already and not measured now stays there.
    """
