"""The `step` layout: one valid ONNX model, `If` by a schedule table, every weight once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from support.artifacts import graphs
from support.models import relative
from torch import Tensor, nn

from calicache.export.layouts.step import step_model
from calicache.graph_passes import OptimizedModel, Plan, StepMode, optimize, record
from calicache.graph_passes.common.errors import ExportError
from calicache.graph_passes.rewriting.fold import reads_output
from calicache.graph_passes.settings.schedule import anchor_table

pytestmark = pytest.mark.slow

R, C, U, FORECAST = StepMode
MIXED = (R, C, U, C, R, U)
PAPER: dict[str, Any] = {"order": 0, "weighting": "increment", "correct": False}


class Residual(nn.Module):
    """One pre-norm residual branch on (2, 5, 8), whose exit is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.enter(x) + timestep[:, None, None]
        return self.leave(h + self.fc2(F.gelu(self.fc1(self.norm(h)))))


class ReservedInputs(Residual):
    def forward(self, output: Tensor, step: Tensor) -> Tensor:
        return super().forward(output, step)


class TakenNames(Residual):
    """Buffers with the names of the values that the layout adds."""

    names = (
        *("step", "output", "mode", "schedule", "is_refresh", "mode_refresh", "x"),
        *("anchor_weight_0", "anchor_weight_0_table", "output_weight_1", "is_forecast"),
    )

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            self.register_buffer(name, torch.randn(8))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        y = super().forward(x, timestep)
        for name in self.names:
            y = torch.sin(y * getattr(self, name))
        return y


class ManyOutputs(Residual):
    def forward(self, x: Tensor, timestep: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        y = super().forward(x, timestep)
        return {"a": y, "b": (x, y, self.leave.bias)}


@torch.library.custom_op("calicache_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class CustomOp(Residual):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return torch.ops.calicache_test.twice(super().forward(x, timestep))


def call(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    return torch.randn(2, 5, 8, generator=draw), torch.full((2,), 1 - 0.1 * step)


def compiled(model: nn.Module, schedule: Sequence[StepMode], **options: Any) -> OptimizedModel:
    """Under the paper's method, but for the options."""
    model.eval().requires_grad_(False)
    with record(model) as recording:
        for step in range(len(schedule)):
            model(*call(step))
    wishes = {**PAPER, "rank": 2, **options}
    plan = Plan.from_trajectory(model, recording, schedule=schedule, **wishes)
    return optimize(model, plan)


def proto(optimized: OptimizedModel) -> onnx.ModelProto:
    return ir.to_proto(step_model(optimized.compiled))


def count_ifs(model: onnx.ModelProto) -> int:
    return sum(node.op_type == "If" for graph in graphs(model.graph) for node in graph.node)


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def stored_as(model: onnx.ModelProto, weight: Tensor) -> list[str]:
    """Initializers that hold a weight, as it is or transposed."""
    plain = weight.detach().numpy()
    return [
        name
        for name, value in arrays(model).items()
        if np.array_equal(value, plain) or np.array_equal(value, plain.T)
    ]


def zero_caches(optimized: OptimizedModel) -> dict[str, np.ndarray]:
    return {
        name: np.zeros(cache.shape, np.float32)
        for name, (cache, _) in optimized.compiled.variant_set.slots().items()
    }


def run(model: onnx.ModelProto, **feed: np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.fixture(scope="module")
def dit_fast(dit, dit_plan) -> OptimizedModel:
    return optimize(dit, dit_plan.with_schedule(MIXED))


@pytest.fixture(scope="module")
def dit_model(dit_fast) -> onnx.ModelProto:
    return proto(dit_fast)


@pytest.fixture(scope="module")
def forecast_fast(dit, forecast_plan) -> OptimizedModel:
    """All four modes, order 2, output weights."""
    return optimize(dit, forecast_plan)


@pytest.fixture(scope="module")
def forecast_model(forecast_fast) -> onnx.ModelProto:
    return proto(forecast_fast)


@pytest.fixture(scope="module")
def diffusers_model(diffusers_dit, diffusers_recording) -> onnx.ModelProto:
    plan = Plan.from_trajectory(diffusers_dit, diffusers_recording, rank=4, schedule=MIXED)
    return proto(optimize(diffusers_dit, plan))


@pytest.mark.parametrize(
    ("name", "ifs"), [("dit_model", 2), ("diffusers_model", 2), ("forecast_model", 3)]
)
def test_full_check_accepts_a_model_with_several_modes(
    name: str, ifs: int, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    onnx.checker.check_model(model, full_check=True)
    assert count_ifs(model) == ifs


def test_inputs_are_the_models_own_then_step_then_caches(dit_fast, dit_model) -> None:
    caches = [cache.name for cache in dit_fast.compiled.variant_set.caches]
    own = ["hidden_states", "timestep", "class_labels"]
    assert [value.name for value in dit_model.graph.input] == [*own, "step", *caches]
    step = dit_model.graph.input[3].type.tensor_type
    assert (step.elem_type, len(step.shape.dim)) == (onnx.TensorProto.INT64, 0)


def test_every_kept_refresh_is_an_input_newest_first(forecast_fast, forecast_model) -> None:
    caches = [cache.name for cache in forecast_fast.compiled.variant_set.caches]
    slots = [f"{name}{back}" for back in ("", "_back1", "_back2") for name in caches]
    names = [value.name for value in forecast_model.graph.input]
    assert names == ["hidden_states", "timestep", "class_labels", "step", *slots]


@pytest.mark.parametrize("name", ["dit", "forecast"])
def test_outputs_are_the_models_own_then_the_next_caches(
    name: str, request: pytest.FixtureRequest
) -> None:
    caches = request.getfixturevalue(f"{name}_fast").compiled.variant_set.caches
    model = request.getfixturevalue(f"{name}_model")
    nexts = [f"{cache.name}_next" for cache in caches]
    assert [value.name for value in model.graph.output] == ["output", *nexts]


@pytest.mark.parametrize("name", ["dit", "forecast"])
def test_cache_inputs_have_the_shapes_of_the_caches(
    name: str, request: pytest.FixtureRequest
) -> None:
    slots = request.getfixturevalue(f"{name}_fast").compiled.variant_set.slots()
    model = request.getfixturevalue(f"{name}_model")
    values = {value.name: value.type.tensor_type for value in model.graph.input}
    for slot, (cache, _) in slots.items():
        assert tuple(dim.dim_value for dim in values[slot].shape.dim) == cache.shape


def test_step_looks_the_mode_up_in_the_schedule_table(dit_model) -> None:
    look_up = dit_model.graph.node[0]
    assert (look_up.op_type, look_up.input[1]) == ("Gather", "step")
    assert arrays(dit_model)[look_up.input[0]].tolist() == list(MIXED)


def test_three_modes_are_two_nested_ifs(dit_model) -> None:
    *_, outer = dit_model.graph.node
    branches = {attribute.name: attribute.g for attribute in outer.attribute}
    *_, inner = branches["else_branch"].node
    assert (outer.op_type, inner.op_type) == ("If", "If")
    names = [branches["then_branch"].name, *(attribute.g.name for attribute in inner.attribute)]
    assert sorted(names) == ["calibrate", "refresh", "reuse"]


def test_four_modes_are_three_nested_ifs_and_forecast_multiplies_no_weights(forecast_model) -> None:
    by_name = {graph.name: graph for graph in graphs(forecast_model.graph)}
    assert {"refresh", "calibrate", "reuse", "forecast"} < set(by_name)
    operations = {node.op_type for node in by_name["forecast"].node}
    assert operations.isdisjoint({"MatMul", "Gemm", "Conv", "Softmax"})


def test_weights_of_every_step_are_tables_in_the_graph_with_the_plans_values(
    forecast_fast, forecast_model
) -> None:
    tables = forecast_fast.compiled.variant_set.tables
    # Own output, three kept ones and the latent; anchors of three kept refreshes.
    assert sorted(tables) == [
        *(f"anchor_weight_{k}" for k in range(3)),
        *(f"output_weight_{k}" for k in range(5)),
    ]
    look_ups = {node.output[0]: node for node in forecast_model.graph.node}
    recipe = forecast_fast.plan.recipe
    anchors = zip(*anchor_table(recipe.schedule, recipe.order), strict=True)
    outputs = zip(*recipe.output_weights, strict=True)
    expected = {f"anchor_weight_{k}": column for k, column in enumerate(anchors)}
    expected |= {f"output_weight_{k}": column for k, column in enumerate(outputs)}
    for name, column in expected.items():
        assert (look_ups[name].op_type, look_ups[name].input[1]) == ("Gather", "step")
        stored = arrays(forecast_model)[look_ups[name].input[0]]
        # Bit by bit: the plan's numbers rounded to float32 once.
        assert np.array_equal(stored, np.array(column, np.float32)), name


def test_a_table_is_an_initializer_of_its_own_name(forecast_model) -> None:
    assert {"anchor_weight_0_table", "output_weight_0_table"} < set(arrays(forecast_model))


def test_order_zero_without_output_weights_has_no_tables(dit_fast, dit_model) -> None:
    assert dit_fast.compiled.variant_set.tables == {}
    assert not any("weight_" in name and "table" in name for name in arrays(dit_model))


@pytest.mark.parametrize("schedule", [(R, FORECAST, R), (R, FORECAST, FORECAST)])
def test_forecast_alone_keeps_the_output_and_nothing_else(schedule: Sequence[StepMode]) -> None:
    optimized = compiled(Residual(), schedule)
    onnx.checker.check_model(proto(optimized), full_check=True)
    assert len(optimized.compiled.variant_set.caches) == 1


@pytest.mark.parametrize("other", [C, U, FORECAST])
def test_two_modes_are_one_if(other: StepMode) -> None:
    model = proto(compiled(Residual(), (R, other, R)))
    onnx.checker.check_model(model, full_check=True)
    assert count_ifs(model) == 1


def test_all_refresh_has_no_if_and_no_caches_but_the_step_input() -> None:
    model = proto(compiled(Residual(), (R, R)))
    onnx.checker.check_model(model, full_check=True)
    assert count_ifs(model) == 0
    assert [value.name for value in model.graph.input] == ["x", "timestep", "step"]
    assert [value.name for value in model.graph.output] == ["output"]


def test_no_variant_holds_initializers_of_its_own(dit_model) -> None:
    outer, *inner = graphs(dit_model.graph)
    assert len(inner) == 4  # refresh, calibrate, reuse, and the graph of the inner If
    assert [len(graph.initializer) for graph in inner] == [0] * 4
    assert len(outer.initializer) > 0


@pytest.mark.parametrize("name", ["dit_model", "diffusers_model", "forecast_model"])
def test_no_two_initializers_are_equal(name: str, request: pytest.FixtureRequest) -> None:
    values = arrays(request.getfixturevalue(name)).values()
    seen = Counter((value.dtype, value.shape, value.tobytes()) for value in values)
    assert max(seen.values()) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [("dit", "dit_model"), ("dit", "forecast_model"), ("diffusers_dit", "diffusers_model")],
)
def test_every_weight_is_stored_once_even_if_transposed(
    source: str, name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    holders = {
        key: stored_as(model, weight)
        for key, weight in request.getfixturevalue(source).named_parameters()
    }
    assert {key: names for key, names in holders.items() if len(names) != 1} == {}


@pytest.mark.parametrize("name", ["dit", "forecast"])
def test_initializers_weigh_as_much_as_weights_and_factors(
    name: str, request: pytest.FixtureRequest
) -> None:
    fast = request.getfixturevalue(f"{name}_fast")
    weights = [*fast.original.parameters(), *fast.original.buffers()]
    factors = [
        part for factor in fast.compiled.factors.values() for part in (factor.down, factor.up)
    ]
    folded = {cache.folded for cache in fast.compiled.variant_set.caches}
    for target in fast.compiled.targets:
        if target.name in folded and reads_output(target):  # K, and K b of the same rank
            read = fast.compiled.factors[target.name].read
            factors += [read, read[:, 0]]
    expected = sum(value.nbytes for value in [*weights, *factors])
    stored = sum(
        value.nbytes for value in arrays(request.getfixturevalue(f"{name}_model")).values()
    )
    # The rest are shapes, schedule, weight tables and LayerNorm's constants: about 0.7 kB.
    assert expected <= stored <= expected + 1024


def test_uncalibrated_exit_layer_is_stored_once() -> None:
    # CALIBRATE runs it as it is, REFRESH taps its output for REUSE.
    optimized = compiled(Residual(), (R, C, U), exclude=["fc2"])
    assert len(stored_as(proto(optimized), optimized.original.fc2.weight)) == 1


@pytest.mark.parametrize("name", ["dit_model", "forecast_model"])
def test_all_names_are_unique(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    values = Counter(value.name for value in model.graph.input)
    nodes: Counter[str] = Counter()
    for graph in graphs(model.graph):
        values.update(tensor.name for tensor in graph.initializer)
        values.update(name for node in graph.node for name in node.output)
        nodes.update(node.name for node in graph.node)
    assert (max(values.values()), max(nodes.values())) == (1, 1)


@pytest.mark.parametrize("options", [{}, {"order": 2}], ids=["order 0", "order 2"])
def test_buffers_named_like_added_values_do_not_clash(options: dict[str, Any]) -> None:
    optimized = compiled(TakenNames(), (R, C, U, R, FORECAST, C), **options)
    model = proto(optimized)
    onnx.checker.check_model(model, full_check=True)
    x, timestep = call(0)
    feed = {"x": x.numpy(), "timestep": timestep.numpy(), "step": np.array(0)}
    got = run(model, **feed, **zero_caches(optimized))["output"]
    # float32 rounding of two implementations, a few layers deep.
    assert relative(torch.from_numpy(got), optimized.original(x, timestep)) < 1e-5


def test_input_with_a_name_of_the_layout_is_refused() -> None:
    with pytest.raises(ExportError, match=r"input (step|output):"):
        step_model(compiled(ReservedInputs(), (R, C)).compiled)


def test_refresh_writes_all_caches_and_other_steps_pass_them_on(
    dit_fast, dit_recording, dit_model
) -> None:
    feed = {name: value.numpy() for name, value in dit_recording.calls[0].items()}
    caches = dit_fast.compiled.variant_set.caches
    first = run(dit_model, **feed, **zero_caches(dit_fast), step=np.array(0))
    assert [first[f"{cache.name}_next"].shape for cache in caches] == [c.shape for c in caches]
    kept = {cache.name: first[f"{cache.name}_next"] for cache in caches}
    for step in (1, 2):  # CALIBRATE, REUSE
        later = run(dit_model, **feed, **kept, step=np.array(step))
        for name, value in kept.items():
            assert np.array_equal(later[f"{name}_next"], value)


@pytest.mark.parametrize("schedule", [(R, C), (R, FORECAST)])
def test_several_outputs_keep_their_order_and_values(schedule: Sequence[StepMode]) -> None:
    optimized = compiled(ManyOutputs(), schedule)
    x, timestep = call(0)
    feed = {"x": x.numpy(), "timestep": timestep.numpy(), "step": np.array(0)}
    # Output weights are 0 for kept outputs that are not there; their values are read all the same.
    got = run(proto(optimized), **feed, **zero_caches(optimized))
    expected = optimized.original(x, timestep)
    for place, value in enumerate([expected["a"], *expected["b"]]):
        # float32 rounding of two implementations, a few layers deep.
        assert relative(torch.from_numpy(got[f"output_{place}"]), value) < 1e-5


def test_op_without_onnx_form_is_named() -> None:
    with pytest.raises(ExportError, match=r"calicache_test.twice") as caught:
        step_model(compiled(CustomOp(), (R, C)).compiled)
    assert caught.value.__cause__ is not None
