"""The `sampler` layout: the whole denoising run as one model, noise in, latents out.

A `Loop` over segments runs REFRESH and then an inner `Loop` over the cheap steps up to the next
REFRESH. The caches are values of the outer body that the inner one reads from outside, so no
step copies them; only refreshes older than the newest travel from segment to segment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from calicache.export.artifact.names import GUIDANCE_INPUT, LATENTS_OUTPUT, NOISE_INPUT
from calicache.export.layouts.hoist_runs import HoistInvariants
from calicache.export.layouts.hoist_steps import StepValues, hoist_steps
from calicache.export.layouts.onnx_graph import (
    LOOK_UP_NAMES,
    InitializerPool,
    argument,
    check_names,
    choose_by_mode,
    inline,
    own_outputs,
    pack,
    take_nodes,
    weight_nodes,
)
from calicache.export.layouts.sampler_arithmetic import FLOAT, Body, SamplerArithmetic, State
from calicache.export.layouts.translate import export_graph, export_variant
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.rewriting.variants import CacheSpec, VariantSet
from calicache.graph_passes.sampler.tables import SamplerTables
from calicache.graph_passes.settings.choices import StepMode

INT64 = ir.DataType.INT64
Values = Mapping[str, ir.Value]
Kept = Mapping[tuple[str, int], ir.Value]  # by cache and refreshes before the segment's own


def noise_spec(optimized: OptimizedModel, sampler: SamplerTables) -> TensorSpec:
    """The sampler's noise and latents: one copy of x, in the sampler's own float32."""
    specs = optimized.plan.binding.signature.tensors
    rows, *rest = next(spec.shape for spec in specs if spec.name == sampler.latent)
    return TensorSpec(NOISE_INPUT, (rows // sampler.parts, *rest), "float32")


def run_specs(optimized: OptimizedModel, sampler: SamplerTables) -> tuple[TensorSpec, ...]:
    """The model's inputs that stay the same over a run: labels, embeddings."""
    specs = optimized.plan.binding.signature.tensors
    made = {sampler.latent, *sampler.inputs}
    return tuple(spec for spec in specs if spec.name not in made)


def sampler_model(optimized: OptimizedModel, sampler: SamplerTables) -> ir.Model:
    """Pack the variants in the `sampler` layout.

    `noise` (B, ...) float32, the model's inputs that stay the same over a run, and
    `guidance_scale` where guidance is batched go in; `latents` come out.

    Raises:
        ExportError: torch's exporter refuses a variant; its reason is passed on.
    """
    added = {NOISE_INPUT: "the noise", GUIDANCE_INPUT: "the guidance scale"}
    check_names(optimized, {**added, LATENTS_OUTPUT: "the result"})
    noise, dependence = noise_spec(optimized, sampler), optimized.plan.binding.dependence
    before, variants = hoist_steps(
        optimized.compiled.captured,
        dependence,
        optimized.compiled.variant_set.variants,
        sampler.inputs,
    )
    variant_set = replace(optimized.compiled.variant_set, variants=variants)
    constant = run_specs(optimized, sampler)
    taken = {*added, LATENTS_OUTPUT, *(spec.name for spec in constant), *LOOK_UP_NAMES}
    pool = InitializerPool(taken | set(variant_set.tables))
    given = {s.name: argument(s.name, s.shape, s.torch_dtype) for s in (noise, *constant)}
    if sampler.guidance is not None:
        given[GUIDANCE_INPUT] = argument(GUIDANCE_INPUT, (), torch.float32)
    models = {mode: export_variant(variants[mode]) for mode in sorted(variants)}
    arithmetic = SamplerArithmetic(sampler, pool, given.get(GUIDANCE_INPUT))
    ahead, stacks = _all_steps(before, sampler, pool, given)
    schedule, specs = optimized.plan.schedule, optimized.plan.binding.signature.tensors
    run = _Run(variant_set, schedule, specs, sampler, pool, given, models, arithmetic, stacks)
    nodes, latents = run.loop_over_segments()
    latents.name = LATENTS_OUTPUT
    like = models[StepMode.REFRESH]
    model = pack("sampler", list(given.values()), [latents], [*ahead, *nodes], pool, like)
    HoistInvariants()(model)
    return model


def _all_steps(
    before: StepValues | None, sampler: SamplerTables, pool: InitializerPool, given: Values
) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """Nodes in front of the run, and the values of all steps by the name that variants read."""
    if before is None:
        return [], {}
    inputs = [
        _step_table(name, sampler, pool) if name in sampler.inputs else given[name]
        for name in before.inputs
    ]
    model = export_graph(before.module, "values of all steps")
    nodes, results = inline(model, "all_steps", inputs, pool)
    return nodes, dict(zip(before.values, results, strict=True))


def _step_table(name: str, sampler: SamplerTables, pool: InitializerPool) -> ir.Value:
    """An input of the model for all steps, (T, *shape)."""
    table = tensor_adapters.TorchTensor(sampler.inputs[name].contiguous())
    return pool.shared(table, f"{name}_by_step")


@dataclass(frozen=True, slots=True)
class _Run:
    variant_set: VariantSet
    schedule: Sequence[StepMode]
    specs: Sequence[TensorSpec]
    sampler: SamplerTables
    pool: InitializerPool
    given: Values
    models: Mapping[StepMode, ir.Model]
    arithmetic: SamplerArithmetic
    stacks: Values

    def loop_over_segments(self) -> tuple[list[ir.Node], ir.Value]:
        """The outermost nodes, and the latents after the last step."""
        top = Body("run")
        marks = [k for k, mode in enumerate(self.schedule) if mode is StepMode.REFRESH]
        lengths = [after - mark - 1 for mark, after in pairwise([*marks, len(self.schedule)])]
        noise = self.given[NOISE_INPUT]
        state = State(noise, (noise, noise) if self.sampler.looks_back else ())
        kept = self._kept_before_the_first_segment(top)
        body = Body("segment")
        place = body.input("place", INT64, ())
        going = body.input("going", ir.DataType.BOOL, ())
        inside = _inputs_like(body, state)
        carried = {
            (cache, back): body.input(f"{cache}_kept{back}", v.dtype, v.shape.numpy())  # type: ignore[union-attr, arg-type]
            for (cache, back), v in kept.items()
        }
        step = body.add("Gather", [self._table("refresh_steps", marks), place], "step", INT64, ())
        length = body.add("Gather", [self._table("lengths", lengths), place], "length", INT64, ())
        after, fresh = self._refresh(body, step, inside, carried)
        cheap = [mode for mode in self.models if mode is not StepMode.REFRESH]
        if cheap:
            older = {slot_name(cache, back + 1): v for (cache, back), v in carried.items()}
            slots = {**fresh, **older}
            after = self._loop_over_cheap_steps(body, cheap, step, length, after, slots)
        moved = [carried[name, back - 1] if back else fresh[name] for name, back in kept]
        going_on = body.add("Identity", [going], "going_on", ir.DataType.BOOL, ())
        results = own_outputs([going_on, *after.values(), *moved], body.nodes, body.prefix)
        inputs = [place, going, *inside.values(), *carried.values()]
        graph = ir.Graph(inputs, results, nodes=body.nodes, name=body.prefix)
        count = self._table("segments", len(marks))
        outcome = _loop(top, count, [*state.values(), *kept.values()], graph)
        return top.nodes, outcome[0]

    def _kept_before_the_first_segment(self, top: Body) -> dict[tuple[str, int], ir.Value]:
        """Zeros for every kept refresh that travels between segments; their weights are 0."""
        kept = {}
        for cache in self.variant_set.caches:
            dtype = tensor_adapters.from_torch_dtype(cache.dtype)
            zero = ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)
            for back in range(self._travelling(cache)):
                shape = self._table(f"{cache.name}_shape", list(cache.shape))
                name = f"{cache.name}_kept{back}"
                kept[cache.name, back] = top.add(
                    "ConstantOfShape", [shape], name, dtype, cache.shape, value=zero
                )
        return kept

    def _travelling(self, cache: CacheSpec) -> int:
        """How many refreshes before the one of a segment its steps read."""
        count = 0
        for mode, variant in self.variant_set.variants.items():
            ahead = 1 if mode is StepMode.REFRESH else 0  # REFRESH reads before it writes
            for back in range(self.variant_set.history):
                if slot_name(cache.name, back) in variant.reads:
                    count = max(count, back + ahead)
        return count

    def _refresh(
        self, body: Body, step: ir.Value, state: State, carried: Kept
    ) -> tuple[State, dict[str, ir.Value]]:
        """The REFRESH of a segment: the state after it, and the fresh caches."""
        slots = {slot_name(cache, back): value for (cache, back), value in carried.items()}
        inputs, values = self._step_values(body, step, state.x, [StepMode.REFRESH])
        nodes, results = self._wired(StepMode.REFRESH, inputs, {**slots, **values})
        body.nodes += nodes
        caches = zip(self.variant_set.caches, results[self.variant_set.outputs :], strict=True)
        fresh = {cache.name: value for cache, value in caches}
        return self.arithmetic.advance(body, step, state, results[0]), fresh

    def _loop_over_cheap_steps(
        self,
        outer: Body,
        modes: Sequence[StepMode],
        start: ir.Value,
        length: ir.Value,
        state: State,
        slots: Values,
    ) -> State:
        body = Body("cheap")
        place = body.input("place", INT64, ())
        going = body.input("going", ir.DataType.BOOL, ())
        inside = _inputs_like(body, state)
        past = body.like("Add", place, self._table("one", 1), "past")
        step = body.like("Add", start, past, "step")
        inputs, values = self._step_values(body, step, inside.x, modes)
        branches = {}
        for mode in modes:
            prefix = mode.name.lower()
            nodes, results = self._wired(mode, inputs, {**slots, **values})
            results = own_outputs(results, nodes, prefix)
            branches[mode] = ir.Graph([], results, nodes=nodes, name=prefix)
        chosen = choose_by_mode(branches, step, self.schedule, self.pool)
        output = chosen.outputs[0]
        body.nodes += take_nodes(chosen)
        after = self.arithmetic.advance(body, step, inside, output)
        going_on = body.add("Identity", [going], "going_on", ir.DataType.BOOL, ())
        results = own_outputs([going_on, *after.values()], body.nodes, body.prefix)
        graph = ir.Graph(
            [place, going, *inside.values()], results, nodes=body.nodes, name=body.prefix
        )
        x, *before = _loop(outer, length, state.values(), graph)
        return State(x, tuple(before))

    def _wired(
        self, mode: StepMode, inputs: Sequence[ir.Value], known: Values
    ) -> tuple[list[ir.Node], list[ir.Value]]:
        """The variant of a mode, fed with the model's inputs and what it reads."""
        reads = [known[name] for name in self.variant_set.variants[mode].reads]
        return inline(self.models[mode], mode.name.lower(), [*inputs, *reads], self.pool)

    def _step_values(
        self, body: Body, step: ir.Value, x: ir.Value, modes: Collection[StepMode]
    ) -> tuple[list[ir.Value], dict[str, ir.Value]]:
        """The model's inputs at a step, and what else the modes read that the step decides."""
        inputs = []
        for spec in self.specs:
            if spec.name == self.sampler.latent:
                inputs.append(self.arithmetic.model_latent(body, step, x, spec))
            elif spec.name in self.sampler.inputs:
                table = _step_table(spec.name, self.sampler, self.pool)
                inputs.append(self._look_up(body, table, step, spec.name))
            else:
                inputs.append(self.given[spec.name])
        reads = {name for mode in modes for name in self.variant_set.variants[mode].reads}
        tables = [name for name in self.variant_set.tables if name in reads]
        look_ups = weight_nodes(self.variant_set, step, self.pool, tables)
        for node in look_ups:
            node.name = node.outputs[0].name = f"{body.prefix}/{node.name}"
        body.nodes += look_ups
        values = dict(zip(tables, (node.outputs[0] for node in look_ups), strict=True))
        for name, stack in self.stacks.items():
            if name in reads:
                values[name] = self._look_up(body, stack, step, name)
        return inputs, values

    def _look_up(self, body: Body, stack: ir.Value, step: ir.Value, name: str) -> ir.Value:
        assert stack.shape is not None
        shape = stack.shape.numpy()[1:]
        return body.add("Gather", [stack, step], name, stack.dtype, shape)

    def _table(self, name: str, values: int | Sequence[int]) -> ir.Value:
        return self.pool.shared(ir.tensor(np.array(values, np.int64)), name)


def _inputs_like(body: Body, state: State) -> State:
    x, *before = [
        body.input(name, FLOAT, value.shape.numpy())  # type: ignore[union-attr]
        for name, value in zip(("x", "x_before", "e_before"), state.values(), strict=False)
    ]
    return State(x, tuple(before))


def _loop(
    body: Body, count: ir.Value, carried: Sequence[ir.Value], graph: ir.Graph
) -> list[ir.Value]:
    """Run a graph `count` times; returns the carried values after it."""
    node = ir.node(
        "Loop",
        [count, None, *carried],
        {"body": graph},
        num_outputs=len(carried),
        name=f"{body.prefix}/loop",
    )
    for value, like in zip(node.outputs, graph.outputs[1:], strict=True):
        value.name = f"{like.name}_last"
        value.type, value.shape = like.type, like.shape
    body.nodes.append(node)
    return list(node.outputs)
