"""What a step of the `sampler` layout hands to a variant: the model's inputs, and what it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import tensor_adapters

from calicache.export.layouts.onnx_graph import InitializerPool, weight_nodes
from calicache.export.layouts.sampler_arithmetic import Body, SamplerArithmetic
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.sampler.tables import SamplerTables
from calicache.graph_passes.settings.choices import StepMode


def step_table(name: str, sampler: SamplerTables, pool: InitializerPool) -> ir.Value:
    """An input of the model for all steps, (T, *shape)."""
    table = tensor_adapters.TorchTensor(sampler.inputs[name].contiguous())
    return pool.shared(table, f"{name}_by_step")


@dataclass(frozen=True, slots=True)
class StepInputs:
    """Where the inputs of a step come from.

    Attributes:
        specs: the model's own tensors.
        variant_set: what the modes read.
        sampler: which of the inputs it makes, and tables of those that change with the step.
        pool: the outer graph's initializers.
        arguments: of the whole run, by name.
        arithmetic: makes the model's latent.
        stacks: values of all steps that the timestep decides, by the name that modes read.
    """

    specs: Sequence[TensorSpec]
    variant_set: VariantSet
    sampler: SamplerTables
    pool: InitializerPool
    arguments: Mapping[str, ir.Value]
    arithmetic: SamplerArithmetic
    stacks: Mapping[str, ir.Value]

    def of_the_model(self, body: Body, step: ir.Value, x: ir.Value) -> list[ir.Value]:
        """The model's own inputs at a step, in order."""
        inputs = []
        for spec in self.specs:
            if spec.name == self.sampler.latent:
                inputs.append(self.arithmetic.model_latent(body, step, x, spec))
            elif spec.name in self.sampler.inputs:
                table = step_table(spec.name, self.sampler, self.pool)
                inputs.append(_look_up(body, table, step, spec.name))
            else:
                inputs.append(self.arguments[spec.name])
        return inputs

    def decided_by_step(
        self, body: Body, step: ir.Value, modes: Collection[StepMode]
    ) -> dict[str, ir.Value]:
        """What else modes read that the step alone decides, by name: weights, hoisted values."""
        reads = {name for mode in modes for name in self.variant_set.variants[mode].reads}
        tables = [name for name in self.variant_set.tables if name in reads]
        look_ups = weight_nodes(self.variant_set, step, self.pool, tables)
        for node in look_ups:
            node.name = node.outputs[0].name = f"{body.prefix}/{node.name}"
        body.nodes += look_ups
        values = dict(zip(tables, (node.outputs[0] for node in look_ups), strict=True))
        for name, stack in self.stacks.items():
            if name in reads:
                values[name] = _look_up(body, stack, step, name)
        return values


def _look_up(body: Body, stack: ir.Value, step: ir.Value, name: str) -> ir.Value:
    assert stack.shape is not None
    return body.add("Gather", [stack, step], name, stack.dtype, stack.shape.numpy()[1:])
