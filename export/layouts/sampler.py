"""The `sampler` layout: the whole denoising run as one model, noise in, latents out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
import torch
from torch import fx

from calicache.export.artifact.manifest import Attention
from calicache.export.artifact.names import GUIDANCE_INPUT, LATENTS_OUTPUT, NOISE_INPUT
from calicache.export.layouts.hoist_runs import HoistInvariants
from calicache.export.layouts.hoist_steps import StepValues, hoist_steps
from calicache.export.layouts.onnx_graph import (
    LOOK_UP_NAMES,
    InitializerPool,
    check_names,
    inline,
    pack,
)
from calicache.export.layouts.sampler_arithmetic import SamplerArithmetic
from calicache.export.layouts.segments import Run, loop_over_segments
from calicache.export.layouts.step_inputs import StepInputs, step_table
from calicache.export.translation.join import argument
from calicache.export.translation.translate import translate
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.compile import Compiled
from calicache.graph_passes.sampler.tables import SamplerTables
from calicache.graph_passes.settings.choices import StepMode

ALL_STEPS = "all_steps"


def noise_spec(compiled: Compiled, sampler: SamplerTables) -> TensorSpec:
    """The sampler's noise and latents: one copy of x, in the sampler's own float32."""
    specs = compiled.analysis.binding.signature.tensors
    rows, *rest = next(spec.shape for spec in specs if spec.name == sampler.latent)
    return TensorSpec(NOISE_INPUT, (rows // sampler.parts, *rest), "float32")


def run_specs(compiled: Compiled, sampler: SamplerTables) -> tuple[TensorSpec, ...]:
    """The model's inputs that stay the same over a run: labels, embeddings."""
    specs = compiled.analysis.binding.signature.tensors
    by_sampler = {sampler.latent, *sampler.inputs}
    return tuple(spec for spec in specs if spec.name not in by_sampler)


def sampler_model(
    compiled: Compiled,
    sampler: SamplerTables,
    attention: Attention = Attention.FUSED,
    samples: int = 1,
) -> ir.Model:
    """Pack the variants in the `sampler` layout.

    `noise` (B, ...) float32, the model's inputs that stay the same over a run, and
    `guidance_scale` where guidance is batched go in; `latents` come out.

    Args:
        compiled: with all calls of a step in one.
        sampler: of as many steps as the schedule has.
        attention: what it is written with.
        samples: of the batch where its size is left open, see `hoist_steps`.

    Raises:
        ExportError: torch's exporter refuses a variant; its reason is passed on.
    """
    added = {
        NOISE_INPUT: "the noise",
        GUIDANCE_INPUT: "the guidance scale",
        LATENTS_OUTPUT: "the result",
    }
    binding = compiled.analysis.binding
    check_names(binding.signature, added)
    plain, variants = compiled.captured, compiled.variant_set.variants
    step_values, variants = hoist_steps(
        plain, binding.dependence, variants, sampler.inputs, samples
    )
    variant_set = replace(compiled.variant_set, variants=variants)
    arguments = _arguments(compiled, sampler)
    reserved = {*added, *arguments, *LOOK_UP_NAMES, *variant_set.tables}
    pool = InitializerPool(reserved)
    modules: dict[StepMode | str, fx.GraphModule] = {
        mode: variant.module for mode, variant in sorted(variants.items())
    }
    if step_values is not None:
        modules[ALL_STEPS] = step_values.module
    translated = translate(modules, attention)
    models = {mode: translated[mode] for mode in sorted(variants)}
    arithmetic = SamplerArithmetic(sampler, pool, arguments.get(GUIDANCE_INPUT))
    ahead, stacks = _all_steps(step_values, translated.get(ALL_STEPS), sampler, pool, arguments)
    inputs = StepInputs(
        binding.signature.tensors, variant_set, sampler, pool, arguments, arithmetic, stacks
    )
    run = Run(variant_set, compiled.recipe.schedule, models, arithmetic, inputs, pool)
    nodes, latents = loop_over_segments(run, arguments[NOISE_INPUT])
    latents.name = LATENTS_OUTPUT
    like = models[StepMode.REFRESH]
    model = pack("sampler", list(arguments.values()), [latents], [*ahead, *nodes], pool, like)
    HoistInvariants()(model)
    return model


def _arguments(compiled: Compiled, sampler: SamplerTables) -> dict[str, ir.Value]:
    """What the caller hands to a whole run, by name."""
    specs = (noise_spec(compiled, sampler), *run_specs(compiled, sampler))
    arguments = {s.name: argument(s.name, s.shape, s.torch_dtype) for s in specs}
    if sampler.guidance is not None:
        arguments[GUIDANCE_INPUT] = argument(GUIDANCE_INPUT, (), torch.float32)
    return arguments


def _all_steps(
    step_values: StepValues | None,
    model: ir.Model | None,
    sampler: SamplerTables,
    pool: InitializerPool,
    arguments: Mapping[str, ir.Value],
) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """Nodes in front of the run, and the values of all steps by the name that variants read."""
    if step_values is None or model is None:
        return [], {}
    inputs = [
        step_table(name, sampler, pool) if name in sampler.inputs else arguments[name]
        for name in step_values.inputs
    ]
    nodes, results = inline(model, ALL_STEPS, inputs, pool)
    return nodes, dict(zip(step_values.values, results, strict=True))
