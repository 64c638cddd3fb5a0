"""The loops of the `sampler` layout: over segments, and in each over its cheap steps.

A segment is a REFRESH and the cheap steps up to the next one. Three kinds of values live in it:

- the sampler's state, which every step hands to the next through both loops;
- the caches that the segment's own REFRESH wrote: the inner loop reads them from outside, so no
  step copies them;
- refreshes of earlier segments: they go from segment to segment through the outer loop, and are
  one refresh older in each. How many, a cache's readers decide (`handed_on`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir
from onnx_ir import tensor_adapters

from calicache.export.layouts.onnx_graph import (
    InitializerPool,
    choose_by_mode,
    inline,
    own_outputs,
    take_nodes,
)
from calicache.export.layouts.sampler_arithmetic import FLOAT, Body, SamplerArithmetic, State
from calicache.export.layouts.step_inputs import StepInputs
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.rewriting.variants import CacheSpec, VariantSet
from calicache.graph_passes.settings.choices import StepMode

INT64 = ir.DataType.INT64
Values = Mapping[str, ir.Value]


@dataclass(frozen=True, slots=True)
class KeptRefresh:
    """A refresh of one cache that goes from segment to segment.

    Attributes:
        cache: the cache's name.
        back: refreshes between it and the newest one before a segment; 0 is that one itself.
    """

    cache: str
    back: int

    @property
    def name(self) -> str:
        """In a graph."""
        return f"{self.cache}_kept{self.back}"

    @property
    def slot_before_refresh(self) -> str:
        """The slot that it fills for the segment's REFRESH, which reads before it writes."""
        return slot_name(self.cache, self.back)

    @property
    def slot_after_refresh(self) -> str:
        """The slot that it fills for the cheap steps: the segment's own refresh is newer."""
        return slot_name(self.cache, self.back + 1)


Kept = Mapping[KeptRefresh, ir.Value]


def handed_on(variant_set: VariantSet, cache: CacheSpec) -> list[KeptRefresh]:
    """The refreshes of a cache that a segment has from those before it: as many as are read."""
    count = 0
    for mode, variant in variant_set.variants.items():
        ahead = 1 if mode is StepMode.REFRESH else 0  # it reads before it writes the newest one
        for back in range(variant_set.history):
            if slot_name(cache.name, back) in variant.reads:
                count = max(count, back + ahead)
    return [KeptRefresh(cache.name, back) for back in range(count)]


@dataclass(frozen=True, slots=True)
class Run:
    """What the loops are made of.

    Attributes:
        variant_set: the caches, and what every mode reads.
        schedule: mode of every step.
        models: the variants in ONNX, each to be inlined once.
        arithmetic: from one state to the next.
        inputs: of the model, at every step.
        pool: the outer graph's initializers.
    """

    variant_set: VariantSet
    schedule: Sequence[StepMode]
    models: Mapping[StepMode, ir.Model]
    arithmetic: SamplerArithmetic
    inputs: StepInputs
    pool: InitializerPool

    @property
    def refresh_steps(self) -> list[int]:
        """Step of every segment's REFRESH."""
        return [step for step, mode in enumerate(self.schedule) if mode is StepMode.REFRESH]

    @property
    def cheap_modes(self) -> list[StepMode]:
        """All modes but REFRESH."""
        return [mode for mode in self.models if mode is not StepMode.REFRESH]

    def table(self, name: str, values: int | Sequence[int]) -> ir.Value:
        """Whole numbers as an initializer."""
        return self.pool.shared(ir.tensor(np.array(values, np.int64)), name)

    def variant(
        self, mode: StepMode, inputs: Sequence[ir.Value], values: Values
    ) -> tuple[list[ir.Node], list[ir.Value]]:
        """Nodes and results of a mode, fed with the model's inputs and what it reads."""
        reads = [values[name] for name in self.variant_set.variants[mode].reads]
        return inline(self.models[mode], mode.name.lower(), [*inputs, *reads], self.pool)


def loop_over_segments(run: Run, noise: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """The outermost nodes, and the latents after the last step."""
    top = Body("run")
    # Nothing is before the first step: its weights for what is read there are 0.
    state = State(noise, (noise, noise) if run.arithmetic.sampler.looks_back else ())
    kept = {
        refresh: _zeros(run, top, refresh, cache)
        for cache in run.variant_set.caches
        for refresh in handed_on(run.variant_set, cache)
    }
    segment = _segment(run, state, kept)
    count = run.table("segments", len(run.refresh_steps))
    latents, *_ = _add_loop(run, top, count, [*state.values(), *kept.values()], segment)
    return top.nodes, latents


def _zeros(run: Run, top: Body, refresh: KeptRefresh, cache: CacheSpec) -> ir.Value:
    """What stands for a refresh that has not been yet."""
    dtype = tensor_adapters.from_torch_dtype(cache.dtype)
    zero = ir.tensor(np.zeros(1, dtype.numpy()), dtype=dtype)
    shape = run.table(f"{cache.name}_shape", list(cache.shape))
    return top.add("ConstantOfShape", [shape], refresh.name, dtype, cache.shape, value=zero)


def _segment(run: Run, start: State, kept_at_start: Kept) -> ir.Graph:
    """One segment, as the body of the outer loop.

    Args:
        run: what the loops are made of.
        start: the state before the first segment, whose form the loop's inputs have.
        kept_at_start: the kept refreshes before it, alike.
    """
    body = Body("segment")
    counter = _counter(body)
    state = _inputs_like(body, start)
    kept = {
        refresh: body.input(refresh.name, value.dtype, value.shape.numpy())  # type: ignore[union-attr, arg-type]
        for refresh, value in kept_at_start.items()
    }
    marks = run.refresh_steps
    lengths = [after - mark - 1 for mark, after in pairwise([*marks, len(run.schedule)])]
    steps = run.table("refresh_steps", marks)
    step = body.add("Gather", [steps, counter.place], "step", INT64, ())
    count = run.table("lengths", lengths)
    length = body.add("Gather", [count, counter.place], "length", INT64, ())
    after, fresh = _refresh(run, body, step, state, kept)
    if run.cheap_modes:
        older = {refresh.slot_after_refresh: value for refresh, value in kept.items()}
        after = _add_cheap_steps(run, body, (step, length), after, {**fresh, **older})
    # To the next segment, this one's refresh is the newest of those before.
    moved = [
        kept[KeptRefresh(refresh.cache, refresh.back - 1)] if refresh.back else fresh[refresh.cache]
        for refresh in kept
    ]
    inputs = [*state.values(), *kept.values()]
    return _close(body, counter, inputs, [*after.values(), *moved])


def _refresh(
    run: Run, body: Body, step: ir.Value, state: State, kept: Kept
) -> tuple[State, dict[str, ir.Value]]:
    """The REFRESH of a segment: the state after it, and the fresh value of every cache."""
    slots = {refresh.slot_before_refresh: value for refresh, value in kept.items()}
    inputs = run.inputs.of_the_model(body, step, state.x)
    values = run.inputs.decided_by_step(body, step, [StepMode.REFRESH])
    nodes, results = run.variant(StepMode.REFRESH, inputs, {**slots, **values})
    body.nodes += nodes
    written = results[run.variant_set.outputs :]
    caches = zip(run.variant_set.caches, written, strict=True)
    fresh = {cache.name: value for cache, value in caches}
    return run.arithmetic.advance(body, step, state, results[0]), fresh


def _add_cheap_steps(
    run: Run, segment: Body, bounds: tuple[ir.Value, ir.Value], start: State, slots: Values
) -> State:
    """The inner loop of a segment: the state after its last step.

    Args:
        run: what the loops are made of.
        segment: the graph that the loop stands in.
        bounds: the step of the segment's REFRESH, and how many steps follow it.
        start: the state after the REFRESH.
        slots: all kept values by the name that modes read, from outside of the loop.
    """
    body = Body("cheap")
    counter, (refresh_step, length) = _counter(body), bounds
    state = _inputs_like(body, start)
    past = body.like("Add", counter.place, run.table("one", 1), "past")
    step = body.like("Add", refresh_step, past, "step")
    inputs = run.inputs.of_the_model(body, step, state.x)
    values = {**slots, **run.inputs.decided_by_step(body, step, run.cheap_modes)}
    branches = {mode: _branch(run, mode, inputs, values) for mode in run.cheap_modes}
    chosen = choose_by_mode(branches, step, run.schedule, run.pool)
    output = chosen.outputs[0]
    body.nodes += take_nodes(chosen)
    after = run.arithmetic.advance(body, step, state, output)
    graph = _close(body, counter, state.values(), after.values())
    x, *before = _add_loop(run, segment, length, start.values(), graph)
    return State(x, tuple(before))


def _branch(run: Run, mode: StepMode, inputs: Sequence[ir.Value], values: Values) -> ir.Graph:
    prefix = mode.name.lower()
    nodes, results = run.variant(mode, inputs, values)
    return ir.Graph([], own_outputs(results, nodes, prefix), nodes=nodes, name=prefix)


@dataclass(frozen=True, slots=True)
class _Counter:
    """Inputs that every body of a Loop has beside its own.

    Attributes:
        place: how many rounds were before.
        going: the condition, always true.
    """

    place: ir.Value
    going: ir.Value


def _counter(body: Body) -> _Counter:
    return _Counter(body.input("place", INT64, ()), body.input("going", ir.DataType.BOOL, ()))


def _close(
    body: Body, counter: _Counter, inputs: Sequence[ir.Value], results: Sequence[ir.Value]
) -> ir.Graph:
    """The finished body of a Loop; results are the inputs of the next round."""
    going_on = body.add("Identity", [counter.going], "going_on", ir.DataType.BOOL, ())
    own = own_outputs([going_on, *results], body.nodes, body.prefix)
    arguments = [counter.place, counter.going, *inputs]
    return ir.Graph(arguments, own, nodes=body.nodes, name=body.prefix)


def _inputs_like(body: Body, state: State) -> State:
    x, *before = [
        body.input(name, FLOAT, value.shape.numpy())  # type: ignore[union-attr]
        for name, value in zip(("x", "x_before", "e_before"), state.values(), strict=False)
    ]
    return State(x, tuple(before))


def _add_loop(
    run: Run, body: Body, count: ir.Value, carried: Sequence[ir.Value], graph: ir.Graph
) -> list[ir.Value]:
    """Run a graph `count` times; returns the carried values after it."""
    always = run.pool.shared(ir.tensor(np.array(True)), "always")
    node = ir.node(
        "Loop",
        [count, always, *carried],
        {"body": graph},
        num_outputs=len(carried),
        name=f"{body.prefix}/loop",
    )
    for value, like in zip(node.outputs, graph.outputs[1:], strict=True):
        value.name = f"{like.name}_last"
        value.type, value.shape = like.type, like.shape
    body.nodes.append(node)
    return list(node.outputs)
