"""The loops of the `sampler` layout: over segments, and in each over its cheap steps.

A segment is a REFRESH and the cheap steps up to the next one. Three kinds of values live in it:

- the sampler's state, which every step hands to the next through both loops;
- the caches that the segment's own REFRESH wrote: the inner loop reads them from outside, so no
  step copies them;
- refreshes of earlier segments: they go from segment to segment through the outer loop, and are
  one refresh older in each. How many, a cache's readers decide (`handed_on`);
- kept outputs of the model, where CALIBRATE steps keep theirs too: like the state, they go from
  step to step (`Run.carried`).
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
from calicache.export.layouts.sampler_arithmetic import (
    FLOAT,
    INT64,
    Body,
    SamplerArithmetic,
    State,
    add_loop,
    close_loop,
    loop_counter,
)
from calicache.export.layouts.step_inputs import StepInputs
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.rewriting.variants import CacheSpec, VariantSet
from calicache.graph_passes.settings.choices import StepMode

Values = Mapping[str, ir.Value]


@dataclass(frozen=True, slots=True)
class KeptValue:
    """A value of one cache that goes from segment to segment, or from step to step.

    Attributes:
        cache: the cache's name.
        back: values between it and the newest one before a segment; 0 is that one itself.
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


Kept = Mapping[KeptValue, ir.Value]


def handed_on(
    variant_set: VariantSet, cache: CacheSpec, *, by_step: bool = False
) -> list[KeptValue]:
    """The values of a cache that are handed on: as many as are read.

    Args:
        variant_set: what every mode reads.
        cache: which.
        by_step: from step to step; else from segment to segment.
    """
    count = 0
    for mode, variant in variant_set.variants.items():
        # REFRESH reads before it writes the newest one.
        ahead = 1 if by_step or mode is StepMode.REFRESH else 0
        for back in range(variant_set.history):
            if slot_name(cache.name, back) in variant.reads:
                count = max(count, back + ahead)
    return [KeptValue(cache.name, back) for back in range(count)]


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

    @property
    def carried(self) -> tuple[str, ...]:
        """Names of the caches that cheap modes write as well."""
        writes = (self.variant_set.variants[mode].writes for mode in self.cheap_modes)
        return next(filter(None, writes), ())

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
    carried = run.carried
    kept = {
        refresh: _zeros(run, top, refresh, cache)
        for cache in run.variant_set.caches
        for refresh in handed_on(run.variant_set, cache, by_step=cache.name in carried)
    }
    segment = _segment(run, state, kept)
    count = run.table("segments", len(run.refresh_steps))
    latents, *_ = add_loop(run.pool, top, count, [*state.values(), *kept.values()], segment)
    return top.nodes, latents


def _zeros(run: Run, top: Body, refresh: KeptValue, cache: CacheSpec) -> ir.Value:
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
    counter = loop_counter(body)
    state = _inputs_like(body, start)
    kept = _held_like(body, kept_at_start)
    marks = run.refresh_steps
    lengths = [after - mark - 1 for mark, after in pairwise([*marks, len(run.schedule)])]
    steps = run.table("refresh_steps", marks)
    step = body.add("Gather", [steps, counter.place], "step", INT64, ())
    count = run.table("lengths", lengths)
    length = body.add("Gather", [count, counter.place], "length", INT64, ())
    after, fresh = _refresh(run, body, step, state, kept)
    # To the next segment, this one's refresh is the newest of those before.
    moved = _pushed(kept, fresh)
    if run.cheap_modes:
        carried = {place: value for place, value in moved.items() if place.cache in run.carried}
        older = {place.slot_after_refresh: v for place, v in kept.items() if place not in carried}
        slots = {**fresh, **older}
        after, carried = _add_cheap_steps(run, body, (step, length), after, slots, carried)
        moved |= carried
    inputs = [*state.values(), *kept.values()]
    return close_loop(body, counter, inputs, [*after.values(), *moved.values()])


def _pushed(kept: Kept, fresh: Values) -> dict[KeptValue, ir.Value]:
    """Kept values after a step that may have written newer ones, by name of the cache."""
    return {
        place: value
        if place.cache not in fresh
        else kept[KeptValue(place.cache, place.back - 1)]
        if place.back
        else fresh[place.cache]
        for place, value in kept.items()
    }


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
    run: Run,
    segment: Body,
    bounds: tuple[ir.Value, ir.Value],
    start: State,
    slots: Values,
    carried: Kept,
) -> tuple[State, dict[KeptValue, ir.Value]]:
    """The inner loop of a segment: the state and the kept outputs after its last step.

    Args:
        run: what the loops are made of.
        segment: the graph that the loop stands in.
        bounds: the step of the segment's REFRESH, and how many steps follow it.
        start: the state after the REFRESH.
        slots: kept values by the name that modes read, from outside of the loop.
        carried: kept values that go from step to step.
    """
    body = Body("cheap")
    counter, (refresh_step, length) = loop_counter(body), bounds
    state = _inputs_like(body, start)
    past = body.like("Add", counter.place, run.table("one", 1), "past")
    step = body.like("Add", refresh_step, past, "step")
    held = _held_like(body, carried)
    inputs = run.inputs.of_the_model(body, step, state.x)
    by_step = run.inputs.decided_by_step(body, step, run.cheap_modes)
    values = {**slots, **{p.slot_before_refresh: v for p, v in held.items()}, **by_step}
    branches = {mode: _branch(run, mode, inputs, values) for mode in run.cheap_modes}
    chosen = choose_by_mode(branches, step, run.schedule, run.pool)
    own = run.variant_set.outputs
    output, fresh = chosen.outputs[0], chosen.outputs[own:]
    body.nodes += take_nodes(chosen)
    after = run.arithmetic.advance(body, step, state, output)
    kept = _kept_after(run, body, step, held, dict(zip(run.carried, fresh, strict=True)))
    inputs = [*state.values(), *held.values()]
    graph = close_loop(body, counter, inputs, [*after.values(), *kept.values()])
    last = add_loop(run.pool, segment, length, [*start.values(), *carried.values()], graph)
    x, *before = last[: len(last) - len(held)]
    return State(x, tuple(before)), dict(zip(held, last[1 + len(before) :], strict=True))


def _branch(run: Run, mode: StepMode, inputs: Sequence[ir.Value], values: Values) -> ir.Graph:
    """A mode as the body of an `If`: the model's outputs, then one for every carried cache.

    A mode that writes none returns others in their place: all branches have one form.
    """
    prefix, own = mode.name.lower(), run.variant_set.outputs
    nodes, results = run.variant(mode, inputs, values)
    fresh = results[own:] or [_like(values[name], results[:own]) for name in run.carried]
    outputs = own_outputs([*results[:own], *fresh], nodes, prefix)
    return ir.Graph([], outputs, nodes=nodes, name=prefix)


def _like(cached: ir.Value, outputs: Sequence[ir.Value]) -> ir.Value:
    """An output of the form of a cached one, which nobody reads; or that one itself."""
    return next((o for o in outputs if (o.shape, o.dtype) == (cached.shape, cached.dtype)), cached)


def _kept_after(
    run: Run, body: Body, step: ir.Value, held: Kept, fresh: Values
) -> dict[KeptValue, ir.Value]:
    """The carried values after a step: pushed where its mode writes them, else as they were.

    Outside of the `If`: OpenVINO does not see the form of a value that a branch passes on.
    """
    if not held:
        return {}
    variants = run.variant_set.variants
    table = np.array([bool(variants[mode].writes) for mode in run.schedule])
    by_step = run.pool.shared(ir.tensor(table), "writes")
    writes = body.add("Gather", [by_step, step], "is_written", ir.DataType.BOOL, ())
    pushed = _pushed(held, fresh)
    return {
        place: body.add(
            "Where",
            [writes, pushed[place], value],
            f"{place.name}_after",
            value.dtype,
            value.shape.numpy(),  # type: ignore[union-attr]
        )
        for place, value in held.items()
    }


def _inputs_like(body: Body, state: State) -> State:
    x, *before = [
        body.input(name, FLOAT, value.shape.numpy())  # type: ignore[union-attr]
        for name, value in zip(("x", "x_before", "e_before"), state.values(), strict=False)
    ]
    return State(x, tuple(before))


def _held_like(body: Body, kept: Kept) -> dict[KeptValue, ir.Value]:
    return {
        place: body.input(place.name, value.dtype, value.shape.numpy())  # type: ignore[union-attr, arg-type]
        for place, value in kept.items()
    }
