"""Outputs as weighted sums of the own one, the kept ones and the latent: nodes and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from support.golden import graph_text
from support.models import relative
from support.toys import captured, run_onnx
from torch import Tensor, fx, nn

from calicache.export import Session, export_onnx
from calicache.graph_passes import CapturedGraph, Plan, Recording, Sites, StepMode, optimize
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.rewriting.output_mix import output_nodes
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.schedule import anchor_table

R, C, U, F = StepMode
NOWHERE = Sites((), (), (), ())
SCHEDULE = (R, R, F)
# Of own output, two kept ones and the latent; a FORECAST has no own one.
REFRESHED, FORECAST = (0.7, -0.4, 0.25, 0.6), (0.0, 1.5, -0.5, 0.3)
TABLE = ((1.0, 0.0, 0.0, 0.0), REFRESHED, FORECAST)


def same(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) + t


def wider(x: Tensor, t: Tensor) -> Tensor:
    """As a model with a learned variance: twice the channels."""
    return torch.cat([torch.tanh(x), torch.sin(x)], 1) + t


def two(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(x) + t, torch.sin(x)


def single(x: Tensor, t: Tensor) -> Tensor:
    """Of a latent in another precision than the output."""
    return torch.tanh(x.float()) + t


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=draw).to(dtype), torch.tensor(0.5)


def emit(graph: CapturedGraph, latent: str | None) -> VariantSet:
    table = TABLE if latent else tuple(row[:-1] for row in TABLE)
    anchors = anchor_table(SCHEDULE, 1)
    return rewrite(graph, NOWHERE, (), {}, {F}, anchors=anchors, outputs=table, latent=latent)


def kept_outputs(graph: CapturedGraph) -> dict[str, tuple[Tensor, ...]]:
    """Two values of every output, newest first."""
    draw = torch.Generator().manual_seed(2)
    shapes = {output_cache(node): node.meta["val"].shape for node in output_nodes(graph)}
    return {k: tuple(torch.randn(v, generator=draw) for _ in range(2)) for k, v in shapes.items()}


def output_cache(node: fx.Node) -> str:
    return f"cache_output_{node.name}"


def mixed(
    function: Callable[..., object], given: Sequence[Tensor], step: int, *, onnx: bool = False
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """A step's outputs, and of every output the terms but for the latent: own and kept."""
    graph = captured(function, *given)
    variant_set, kept = emit(graph, "x"), kept_outputs(graph)
    variant = variant_set.variants[SCHEDULE[step]]
    values = variant_set.read(
        variant.reads, kept, variant_set.weights_of(step), torch.device("cpu")
    )
    results = run_onnx if onnx else (lambda module, *every: list(module(*every)))
    own = graph.module(*given)
    names = [output_cache(node) for node in output_nodes(graph)]
    terms = [[e, *kept[name]] for e, name in zip(own, names, strict=True)]
    return results(variant.module, *given, *values)[: variant_set.outputs], terms


def weighted(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for weight, term in zip(weights, terms, strict=True):
        total = total + weight * term.double()
    return total


def assert_near(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == torch.float32
    # Weights and a sum of four terms of size 1, each rounded to float32 (6e-8).
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


# --- nodes --------------------------------------------------------------------------------------


def written(latent: str | None, mode: StepMode) -> list[str]:
    """The lines of a variant from the first mixed value on."""
    variant_set = emit(captured(wider, *inputs(2, 3)), latent)
    lines = graph_text(variant_set.variants[mode].module.graph).splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("mul_tensor:"))
    return lines[first:]


KEPT = [
    "mul_tensor: float32 [2, 6] = aten.mul.Tensor(cache_output_add, output_weight_1)",
    "mul_tensor_1: float32 [2, 6] = aten.mul.Tensor(cache_output_add_back1, output_weight_2)",
    "add_tensor: float32 [2, 6] = aten.add.Tensor(mul_tensor, mul_tensor_1)",
]
OWN = [
    "mul_tensor_2: float32 [2, 6] = aten.mul.Tensor(add, output_weight_0)",
    "add_tensor_1: float32 [2, 6] = aten.add.Tensor(mul_tensor_2, add_tensor)",
]
PAD = "constant_pad_nd_default: float32 [2, 6] = aten.constant_pad_nd.default({}, [0, 3])"


def test_forecast_with_a_latent_adds_it_to_the_kept_outputs() -> None:
    assert written("x", F) == [
        *KEPT,
        "mul_tensor_2: float32 [2, 3] = aten.mul.Tensor(x, output_weight_3)",
        PAD.format("mul_tensor_2"),
        "add_tensor_1: float32 [2, 6] = aten.add.Tensor(add_tensor, constant_pad_nd_default)",
        "return (add_tensor_1,)",
    ]


def test_refresh_with_a_latent_adds_it_to_all_outputs_and_keeps_the_own_one() -> None:
    assert written("x", R) == [
        *KEPT,
        *OWN,
        "mul_tensor_3: float32 [2, 3] = aten.mul.Tensor(x, output_weight_3)",
        PAD.format("mul_tensor_3"),
        "add_tensor_2: float32 [2, 6] = aten.add.Tensor(add_tensor_1, constant_pad_nd_default)",
        "return (add_tensor_2, add)",
    ]


def test_without_a_latent_only_outputs_are_mixed() -> None:
    assert written(None, F) == [*KEPT, "return (add_tensor,)"]
    assert written(None, R) == [*KEPT, *OWN, "return (add_tensor_1, add)"]
    assert "output_weight_3" not in emit(captured(wider, *inputs(2, 3)), None).tables


def test_outputs_of_the_latents_form_need_no_other_node() -> None:
    variant_set = emit(captured(same, *inputs(2, 3)), "x")
    operations = [node.target for node in variant_set.variants[F].module.graph.nodes]
    assert torch.ops.aten.constant_pad_nd.default not in operations
    assert torch.ops.aten._to_copy.default not in operations
    assert variant_set.variants[F].reads[-1] == "output_weight_3"


def test_latent_is_found_by_name_among_the_inputs() -> None:
    graph = captured(lambda t, noise: torch.tanh(noise) + t, torch.zeros(()), torch.ones(2, 3))
    assert [spec.name for spec in graph.signature.tensors] == ["t", "noise"]
    lines = graph_text(emit(graph, "noise").variants[F].module.graph)
    assert "aten.mul.Tensor(noise, output_weight_3)" in lines


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("step", "weights"), [(1, REFRESHED), (2, FORECAST)], ids=["R", "F"])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)], ids=str)
def test_output_is_the_weighted_sum(
    shape: tuple[int, ...], step: int, weights: Sequence[float]
) -> None:
    given = inputs(*shape)
    (got,), (terms,) = mixed(same, given, step)
    assert_near(got, weighted(weights, [*terms, given[0]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "step", "weights", "onnx"),
    [
        ((2, 3), 1, REFRESHED, False),
        ((2, 3), 2, FORECAST, False),
        ((2, 3, 4), 2, FORECAST, False),
        ((2, 3, 4, 5), 1, REFRESHED, False),
        ((2, 3, 4, 5), 2, FORECAST, True),
    ],
)
def test_channels_that_the_latent_lacks_have_none_of_it(
    shape: tuple[int, ...], step: int, weights: Sequence[float], onnx: bool
) -> None:
    given = inputs(*shape)
    (got,), (terms,) = mixed(wider, given, step, onnx=onnx)
    expected = weighted(weights[:-1], terms)
    assert_near(got[:, 3:], expected[:, 3:])
    assert_near(got[:, :3], expected[:, :3] + weights[-1] * given[0])


@pytest.mark.slow
@pytest.mark.parametrize("onnx", [False, True], ids=["torch", "onnx"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_latent_of_another_dtype_gives_the_outputs_dtype(dtype: torch.dtype, onnx: bool) -> None:
    given = inputs(2, 3, dtype=dtype)
    (got,), (terms,) = mixed(single, given, 2, onnx=onnx)
    assert got.dtype == torch.float32
    expected = weighted(FORECAST, [*terms, given[0]])
    # As in `assert_near`, and w_x x is rounded in the latent's own precision.
    bound = max(1e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize(("step", "weights"), [(1, REFRESHED), (2, FORECAST)], ids=["R", "F"])
def test_only_the_first_of_two_outputs_gets_the_latent(step: int, weights: Sequence[float]) -> None:
    given = inputs(2, 3)
    (first, second), (of_first, of_second) = mixed(two, given, step)
    assert_near(first, weighted(weights, [*of_first, given[0]]))
    assert_near(second, weighted(weights[:-1], of_second))


# --- what cannot be mixed -----------------------------------------------------------------------


def refuses(message: str) -> pytest.RaisesExc[PlanError]:
    return pytest.raises(PlanError, match=f"^{re.escape(message)}$")


def test_name_of_no_input_is_refused() -> None:
    with refuses(
        "plan: latent: expected x | t, got noise. Make the plan again from the recording."
    ):
        emit(captured(same, *inputs(2, 3)), "noise")


@pytest.mark.parametrize(
    ("function", "latent", "output", "got"),
    [
        (same, "t", "(2, 3)", "()"),
        (lambda x, t: x[:, :2] * t, "x", "(2, 2)", "(2, 3)"),  # fewer channels than the latent
        (lambda x, t: x[:1] * t, "x", "(1, 3)", "(2, 3)"),
        (lambda x, t: x[..., None] * t, "x", "(2, 3, 1)", "(2, 3)"),
        (lambda x, t: torch.cat([x, x])[:, :, None] * t, "x", "(4, 3, 1)", "(2, 3)"),
    ],
    ids=["no batch", "channels", "batch", "dimensions", "both"],
)
def test_latent_of_another_shape_is_refused(
    function: Callable[..., object], latent: str, output: str, got: str
) -> None:
    with refuses(
        f"plan: latent: expected an input of the first output's shape {output}, or fewer "
        f"channels, got {got}. Make the plan again from the recording."
    ):
        emit(captured(function, *inputs(2, 3)), latent)


def test_latent_of_another_size_is_refused() -> None:
    with refuses(
        "plan: latent: expected an input of the first output's shape (2, 3, 2), or fewer "
        "channels, got (2, 3, 4). Make the plan again from the recording."
    ):
        emit(captured(lambda x, t: x[..., :2] * t, *inputs(2, 3, 4)), "x")


@pytest.mark.slow
@pytest.mark.parametrize("latent", [None, "x"])
def test_output_that_is_no_floating_point_tensor_is_refused(latent: str | None) -> None:
    with pytest.raises(PlanError) as caught:
        emit(captured(lambda x, t: (x + t, x.argmax(1)), *inputs(2, 3)), latent)
    assert str(caught.value) == (
        "plan: output argmax: expected a floating-point tensor, which can be forecast, got "
        "torch.int64. Use CALIBRATE or REUSE steps, without a correction."
    )


# --- a whole run --------------------------------------------------------------------------------


FITTED = range(1, 5)  # the first step is exact, and what follows the last was not recorded


@pytest.mark.slow
def test_exported_run_of_a_model_with_a_learned_variance_gives_what_torch_gives(
    diffusers_dit: DiTTransformer2DModel, diffusers_recording: Recording, tmp_path: Path
) -> None:
    plan = Plan.from_trajectory(
        diffusers_dit, diffusers_recording, schedule=(R, F, R, C, U, F), rank=4
    )
    table = plan.recipe.output_weights
    assert table is not None
    assert plan.recipe.latent == "hidden_states"
    fast = optimize(diffusers_dit, plan)
    export_onnx(fast, tmp_path / "d")
    session = Session(tmp_path / "d")
    kept = list[Tensor]()
    for step, call in enumerate(diffusers_recording.calls):
        got = torch.from_numpy(session.step(step, **call))
        eager = first_of(fast, call)
        assert (eager.shape[1], call["hidden_states"].shape[1]) == (8, 4)
        # float32 in two runtimes gives about 3e-7.
        assert relative(got, eager) < 1e-5, step
        if step in FITTED:  # a latent left out would be seen
            assert float(abs(table[step][-1]) * call["hidden_states"].norm() / eager.norm()) > 5e-4
        rest = weighted(table[step][1 : 1 + len(kept)], kept) + torch.zeros_like(eager).double()
        rest[:, :4] += table[step][-1] * call["hidden_states"]
        if plan.schedule[step] is R:
            kept.insert(0, first_of(diffusers_dit, call))
        elif plan.schedule[step] is C:  # its own output, out of what it returned
            kept.insert(0, ((eager.double() - rest) / table[step][0]).float())
        elif plan.schedule[step] is F:
            # A sum of four float32 terms.
            assert relative(got.double(), rest) < 1e-5, step


def first_of(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**call)[0]
    return output
