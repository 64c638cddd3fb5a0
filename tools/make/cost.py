"""`calicache cost`: what a model, planning and a search take, from shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor, nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.scale.scale import ModelScale, model_scale
from calicache.graph_passes.api.scale.stages import Extent, Stage
from calicache.graph_passes.common.errors import CalicacheError, ModelError, reason_of
from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import uniform_schedule
from calicache.tools.bench.models import MODELS, BenchModel
from calicache.tools.terminal.model_file import call_in_file, load_config
from calicache.tools.terminal.text import fact_grid, format_count, plain_table, show_value, title

INTERVAL = 3  # of Plan.from_trajectory
SIZES = re.compile(r"(?P<name>[\w.]+)=(?P<sizes>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
Subject = tuple[nn.Module, BenchModel | None]


def cost(
    model: str,
    recording: Path | None,
    plan: Path | None,
    argument: list[str],
    latent: str,
    timestep: str,
    dtype: str | None,
    steps: int,
    rank: int,
    order: int,
    runs: int,
    budget: float,
    json: bool,
) -> None:
    """Count and show."""
    module, bench = on_meta(model, dtype)
    recipe: Recipe | None = None
    if plan is not None:
        planned = Plan.load(plan).one(str(plan))
        binding, recipe = planned.binding, planned.recipe
    elif recording is not None:
        recorded = Recording.load(recording)
        binding, steps = bind(module, recorded), recorded.steps
    else:
        form = call_of(argument, latent, timestep) if argument else bench
        if form is None:
            raise _no_call(model)
        binding = imagined_binding(module, form, steps)
    if recipe is None:
        recipe = usual_recipe(steps, rank, order)
    extent = Extent(search_runs=runs, budget=budget)
    show_value(model_scale(module, binding, recipe, extent), described, json=json)


def usual_recipe(steps: int, rank: int, order: int) -> Recipe:
    """That of `Plan.from_trajectory` where it is told nothing else."""
    return Recipe(uniform_schedule(steps, INTERVAL), rank, order, Weighting.COVARIANCE)


def on_meta(spec: str, dtype: str | None = None) -> Subject:
    """A model without values, and the form of its calls where the function gives it.

    Args:
        spec: a name of `calicache bench`, FILE.py:FUNCTION that returns a BenchModel or a module,
            or a folder with the config.json of a model of diffusers.
        dtype: of its weights; as they are where None.

    Raises:
        ModelError: it is none of them, or cannot be made on the meta device.
    """
    bench: BenchModel | None = None
    module: nn.Module
    if Path(spec).is_dir():
        module = load_config(Path(spec))
    else:
        with torch.device("meta"):
            made = MODELS[spec]() if spec in MODELS else call_in_file(spec, WANTED, _fits)
            if isinstance(made, BenchModel):
                bench, module = made, _built(spec, made)
            else:
                module = made
    cast = None if dtype is None else getattr(torch, dtype)
    return module.to("meta", cast).eval(), bench


WANTED = "a BenchModel, or an nn.Module"


def _fits(value: object) -> bool:
    return isinstance(value, BenchModel | nn.Module)


def _built(spec: str, bench: BenchModel) -> nn.Module:
    try:
        return bench.build()
    except CalicacheError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            spec,
            expected="a model that can be made on the meta device",
            got=reason_of(error),
            fix="Read no values of tensors while the model is made.",
        ) from error


def imagined_binding(module: nn.Module, form: BenchModel, steps: int) -> Binding:
    """What a plan would be tied to, with calls that nobody made.

    Raises:
        CalicacheError: the model does not take these arguments.
    """
    like = next((p.dtype for p in module.parameters()), torch.get_default_dtype())
    inputs = {name: _with_values(value, like) for name, value in form.inputs.items()}
    try:
        recording = replace(form, inputs=inputs).imagined(module, steps)
    except TypeError as error:  # of the binding of arguments to the model's own
        raise ModelError(
            type(module).__name__,
            expected="a call with all arguments that it needs",
            got=reason_of(error),
            fix="Name them with --input.",
        ) from error
    binding = bind(module, recording)
    specs = tuple(
        replace(spec, dtype=str(like).removeprefix("torch."))
        if spec.torch_dtype.is_floating_point
        else spec
        for spec in binding.signature.tensors
    )
    return replace(binding, signature=replace(binding.signature, tensors=specs))


def _with_values(value: Any, like: torch.dtype) -> Any:
    """Zeros where a tensor has no values of its own, in the dtype of the weights."""
    if not isinstance(value, Tensor):
        return value
    dtype = like if value.is_floating_point() else value.dtype
    return torch.zeros(value.shape, dtype=dtype)


def call_of(arguments: Sequence[str], latent: str, timestep: str) -> BenchModel:
    """The form of a call from `NAME=SIZES:DTYPE` of every tensor.

    Raises:
        ModelError: one cannot be read, or the latent is missing.
    """
    tensors: dict[str, Tensor] = {}
    for text in arguments:
        match = SIZES.fullmatch(text)
        dtype = getattr(torch, (match and match["dtype"]) or "float32", None)
        if match is None or not isinstance(dtype, torch.dtype):
            raise ModelError(
                f"--input {text}",
                expected="NAME=SIZES or NAME=SIZES:DTYPE, such as hidden_states=1x4096x64",
                got=repr(text),
                fix="Write it so.",
            )
        sizes = [int(size) for size in match["sizes"].split("x")]
        tensors[match["name"]] = torch.zeros(sizes, dtype=dtype)
    if latent not in tensors:
        raise ModelError(
            "--input",
            expected=f"one named {latent}, the latent",
            got=", ".join(tensors),
            fix="Add it, or name the latent with --latent.",
        )
    noise = tuple(tensors.pop(latent).shape)
    tensors.pop(timestep, None)
    return BenchModel("", 0, nn.Module, noise, tensors, latent, timestep, guidance=None)


def _no_call(model: str) -> ModelError:
    return ModelError(
        model,
        expected="the form of its calls",
        got="a model alone",
        fix="Give --input for every tensor of a call, --recording, --plan, or a function that "
        "returns a BenchModel.",
    )


def described(scale: ModelScale) -> RenderableType:
    """The figures as tables."""
    return Group(*_described(scale))


def _described(scale: ModelScale) -> Iterator[RenderableType]:
    calls = f"{scale.calls} calls a step, " if scale.calls > 1 else ""
    yield fact_grid(
        [
            ("parameters", f"{format_count(scale.parameters)} of {scale.dtype}"),
            ("weights", format_count(scale.weight_bytes, "B")),
            ("one call", f"{format_count(scale.call_macs)} MACs"),
            ("values in it", format_count(scale.call_bytes, "B")),
            ("run", f"{calls}{scale.steps} steps"),
            ("inside", f"{scale.blocks} residual branches, {scale.sites} linear layers"),
            ("recipe", scale.recipe),
            ("targets", str(scale.targets)),
        ]
    )
    yield title("Running, a request")
    yield plain_table(("mode",), ("step", "REFRESH", "caches"), _mode_rows(scale))
    yield Text("step, REFRESH: MACs against the plain model's", style="dim")
    yield title("On disk and beside the weights")
    yield fact_grid(
        [
            ("recorded run", format_count(scale.recording_bytes, "B")),
            ("statistics", _with_sums(scale.statistics_bytes, scale.sum_bytes)),
            (
                "of a search",
                _with_sums(scale.search_statistics_bytes, scale.search_sum_bytes),
            ),
            ("factors", format_count(scale.factor_bytes, "B")),
        ]
    )
    for name, stages in (("Plan.from_trajectory", scale.planning), ("Plan.search", scale.search)):
        yield title(name)
        yield plain_table(("stage",), ("calls", "beside", "memory"), _stage_rows(scale, stages))
    yield Text(
        "calls: of the plain model; beside: other arithmetic, in such calls; memory: weights "
        "included, recordings not",
        style="dim",
    )


def _with_sums(numbers: int, sums: int) -> str:
    return f"{format_count(numbers, 'B')}; {format_count(sums, 'B')} while they are observed"


def _mode_rows(scale: ModelScale) -> Iterator[Sequence[str]]:
    modes: Mapping[str, Any] = scale.modes
    for name, mode in modes.items():
        kept = format_count(mode.request_bytes, "B")
        yield name.upper(), f"{mode.share:.3f}", f"{mode.refresh_share:.3f}", kept
    kept = format_count(scale.request_bytes, "B")
    yield "the recipe's run", f"{scale.run_share:.3f}", "", kept


def _stage_rows(scale: ModelScale, stages: Sequence[Stage]) -> Iterator[Sequence[str]]:
    for stage in stages:
        beside = f"{stage.macs / scale.call_macs:.3g}" if stage.macs else ""
        memory = format_count(scale.weight_bytes + stage.nbytes, "B")
        yield stage.name, f"{stage.calls:.3g}", beside, memory
    calls, runs = scale.calls_of(stages), scale.runs_of(stages)
    peak = format_count(scale.peak(stages), "B")
    yield "all", f"{calls:.3g} in all", f"{runs:.3g} runs", peak
