"""Capture: the graph equals the model, is pure, and shares the model's weights."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from model import FashionDiT
from support.artifacts import RECOMPILE
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from calicache.graph_passes.common.errors import CaptureError
from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.surgery import find_node, finish, module_path, shape_of
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import flatten_call

aten = torch.ops.aten
# The graph calls the same kernels as the model; layouts may pick another GEMM: a few ulp.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def captured_from(model: nn.Module, *args: Any, **kwargs: Any) -> CapturedGraph:
    return capture(model, flatten_call(model, args, kwargs).signature())


def run(captured: CapturedGraph, *tensors: Tensor) -> Any:
    """The model's return value, computed by the graph."""
    return pytree.tree_unflatten(captured.module(*tensors), captured.output_tree)


def assert_pure(graph: fx.Graph) -> None:
    for node in graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.target
        assert "assert" not in str(node.target)
        assert node.users or node.op in ("placeholder", "output"), f"dead: {node.name}"


def called_linears(model: nn.Module, arguments: dict[str, Any]) -> list[str]:
    """Paths of the nn.Linear modules in call order, seen by hooks; `@n` at the n-th reuse."""
    names: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model(**arguments)
    for handle in handles:
        handle.remove()
    again = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}@{n}" if n else name for name, n in zip(names, again, strict=True)]


@dataclass(frozen=True)
class Real:
    """A real model, its recording and its graph."""

    model: nn.Module
    recording: Recording
    captured: CapturedGraph


@pytest.fixture(scope="module", params=["dit", "diffusers"])
def real(request: pytest.FixtureRequest) -> Real:
    model = request.getfixturevalue("dit" if request.param == "dit" else "diffusers_dit")
    recording = request.getfixturevalue(f"{request.param}_recording")
    return Real(model, recording, capture(model, recording.signature))


@pytest.fixture(scope="module")
def dit_graph(dit: nn.Module, dit_recording: Recording) -> CapturedGraph:
    return capture(dit, dit_recording.signature)


# --- two real models --------------------------------------------------------------------------


@pytest.mark.slow
def test_graph_equals_the_model_at_every_step(real: Real) -> None:
    for call in real.recording.calls:
        got, expected = run(real.captured, *call.values()), real.model(**call)
        assert type(got) is type(expected)
        if not isinstance(expected, Tensor):
            got, expected = got.sample, expected.sample
        torch.testing.assert_close(got, expected, **CLOSE)


def test_linear_and_attention_stay_whole(real: Real) -> None:
    # One patch embedding, 4 around the blocks, 7 in each; diffusers embeds in every block.
    linears = 5 + 2 * 7 if isinstance(real.model, FashionDiT) else 2 + 2 + 2 * 9
    counts = Counter(node.target for node in real.captured.graph.nodes)
    assert counts[aten.linear.default] == linears
    assert counts[aten.scaled_dot_product_attention.default] == 2
    assert not {aten.mm.default, aten.addmm.default, aten.bmm.default} & counts.keys()


def test_graph_is_pure_without_asserts_or_dead_code(real: Real) -> None:
    assert_pure(real.captured.graph)


def test_module_paths_are_those_of_the_modules_called(real: Real) -> None:
    nodes = [n for n in real.captured.graph.nodes if n.target is aten.linear.default]
    expected = called_linears(real.model, dict(real.recording.calls[0]))
    assert [module_path(node) for node in nodes] == expected


def test_weights_are_the_models_own_memory(real: Real) -> None:
    tensors = [*real.model.named_parameters(), *real.model.named_buffers()]
    own = {name: tensor.data_ptr() for name, tensor in tensors}
    targets = [node.target for node in real.captured.graph.nodes if node.op == "get_attr"]
    assert len(targets) > 20
    for target in targets:
        assert real.captured.attribute(target).data_ptr() == own[target]


def test_placeholders_are_the_tensors_of_the_call(real: Real) -> None:
    nodes = [node for node in real.captured.graph.nodes if node.op == "placeholder"]
    specs = real.captured.signature.tensors
    assert [node.name for node in nodes] == [spec.name for spec in specs]
    assert [shape_of(node) for node in nodes] == [spec.shape for spec in specs]


@pytest.mark.slow
def test_a_model_on_the_meta_device_can_be_captured(
    dit: nn.Module, dit_graph: CapturedGraph
) -> None:
    on_meta = capture(copy.deepcopy(dit).to("meta"), dit_graph.signature)
    assert on_meta.attribute("patch_embed.weight").is_meta
    # Attention's strides differ there, and with them views and copies; nothing else does.
    for target in (aten.linear.default, aten.layer_norm.default):
        paths = [
            [module_path(node) for node in captured.graph.nodes if node.target is target]
            for captured in (on_meta, dit_graph)
        ]
        assert paths[0] == paths[1]
    assert [shape_of(node) for node in on_meta.graph.nodes if node.op == "placeholder"] == [
        spec.shape for spec in dit_graph.signature.tensors
    ]


def test_nodes_are_found_by_name(dit_graph: CapturedGraph) -> None:
    assert dit_graph.node("linear").target is aten.linear.default
    with pytest.raises(KeyError):
        dit_graph.node("no_such_node")


# --- tiny models ------------------------------------------------------------------------------


X = torch.randn(2, 3, 4)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        y.mul_(2)[:, 0] = 3.0
        y += 1
        return F.relu_(y)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(self.inner(x)))


class Wasteful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, ignored: Tensor, flag: bool = True) -> Tensor:
        self.unused(x).sum()
        torch._check(x.shape[0] == 2)
        return self.used(x) if flag else ignored


class Nested(nn.Module):
    def forward(self, x: Tensor, cond: dict[str, Any], **more: Tensor) -> dict[str, Any]:
        y = x + cond["b"][0] * cond["a"] + more["extra"]
        return {"y": y, "rest": (x, [None, 3, y * 2])}


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else x * 2


class WritesToData(nn.Module):
    """Fills a part of a tensor by `.data`, as CogVideoX does, and reads weights so."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        table = x.new_zeros(3, 4)
        table.data[:, 1:].copy_(torch.arange(9, dtype=x.dtype).view(3, 3))
        return F.linear(x, self.inner.weight.data, self.inner.bias.data) + table


class ChangesInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2


class ChangesBuffer(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


def test_in_place_ops_become_pure_ones() -> None:
    model = InPlace().eval()
    captured = captured_from(model, X)
    assert_pure(captured.graph)
    torch.testing.assert_close(run(captured, X), model(X), **CLOSE)


def test_what_is_written_to_data_is_traced() -> None:
    model = WritesToData().eval()
    x = torch.randn(3, 4)
    captured = captured_from(model, x)
    assert_pure(captured.graph)
    torch.testing.assert_close(run(captured, x), model(x), **CLOSE)
    linear = next(node for node in captured.graph.nodes if node.target is aten.linear.default)
    assert [node.target for node in linear.args[1:]] == ["inner.weight", "inner.bias"]


def test_a_module_called_again_is_marked() -> None:
    captured = captured_from(Twice().eval(), X)
    paths = [module_path(n) for n in captured.graph.nodes if n.target is aten.linear.default]
    assert paths == ["inner.0", "inner.0@1", "inner.0@2"]


def test_dead_code_goes_and_unused_inputs_stay() -> None:
    captured = captured_from(Wasteful().eval(), X, X)
    assert [(node.op, node.target) for node in captured.graph.nodes] == [
        ("placeholder", "x"),
        ("placeholder", "ignored"),
        ("get_attr", "used.weight"),
        ("get_attr", "used.bias"),
        ("call_function", aten.linear.default),
        ("output", "output"),
    ]


def test_nested_inputs_and_outputs_keep_their_structure() -> None:
    model, one = Nested().eval(), torch.ones(1)
    cond = {"b": [2 * one, None], "a": one}
    captured = captured_from(model, X, cond, extra=3 * one, other=7)
    got = run(captured, X, 2 * one, one, 3 * one)
    expected = model(X, cond, extra=3 * one)
    assert got["rest"][1][:2] == [None, 3]
    # Two additions, in the same order: bitwise.
    torch.testing.assert_close(got["y"], expected["y"], rtol=0, atol=0)
    torch.testing.assert_close(got["rest"][1][2], expected["rest"][1][2], rtol=0, atol=0)
    assert isinstance(got["rest"], tuple)


@pytest.mark.slow
def test_diffusers_tuple_form_gives_back_a_tuple(diffusers_dit: nn.Module) -> None:
    call = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    latent = torch.randn(1, 4, 8, 8)
    captured = captured_from(diffusers_dit, latent, **call, return_dict=False)
    got = run(captured, latent, *call.values())
    expected = diffusers_dit(latent, **call, return_dict=False)
    assert type(got) is type(expected) is tuple
    torch.testing.assert_close(got, expected, **CLOSE)


# torch counts attention as impure, for the dropout that it might do.
@pytest.mark.parametrize("target", [aten.relu.default, aten.scaled_dot_product_attention.default])
def test_finish_drops_what_nobody_reads(dit_graph: CapturedGraph, target: Any) -> None:
    graph = copy.deepcopy(dit_graph.graph)
    value = find_node(graph, "transpose_1")
    with graph.inserting_after(value):
        graph.call_function(target, (value,) * (1 if target is aten.relu.default else 3))
    before = len(graph.nodes)
    assert len(finish(graph).nodes) == before - 1
    assert_pure(graph)


# --- what cannot be captured ------------------------------------------------------------------


def test_training_mode_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        captured_from(InPlace(), X)
    message = str(caught.value)
    assert "capture: InPlace: expected a model in eval mode, got training mode." in message
    assert "Call model.eval() first." in message


class AttentionWithDropout(nn.Module):
    """Drops out by an argument, as many models of one's own do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = 0.1 if self.training else 0.0
        return F.scaled_dot_product_attention(x, x, x, dropout_p=share)


@pytest.mark.parametrize(
    "part",
    [nn.Dropout(), nn.BatchNorm1d(3), nn.LSTM(4, 4, 2, dropout=0.5), AttentionWithDropout()],
    ids=lambda part: type(part).__name__,
)
def test_a_part_that_is_training_is_refused(part: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), part).eval()
    part.train()
    refusal = r"expected a model in eval mode, got .* in 1\. Call model\.eval\(\) first"
    with pytest.raises(CaptureError, match=refusal):
        captured_from(model, X)


def test_a_flag_that_changes_nothing_is_no_reason_to_refuse() -> None:
    """The layers that peft adds are in training mode, and pipelines do not change that."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.BatchNorm1d(3)).eval()
    expected = [str(node.target) for node in captured_from(model, X).graph.nodes]
    model[0].train()
    model[1].train()
    assert [str(node.target) for node in captured_from(model, X).graph.nodes] == expected


def test_the_reason_of_torch_export_is_passed_on() -> None:
    with pytest.raises(CaptureError) as caught:
        captured_from(Branching().eval(), X)
    message = str(caught.value)
    assert "capture: Branching: expected a model that torch.export captures, got" in message
    assert "data-dependent expression" in message
    assert "Remove what torch.export cannot trace" in message
    assert caught.value.__cause__ is not None


@pytest.mark.slow
@pytest.mark.parametrize(("model", "place"), [(ChangesInput(), "x"), (ChangesBuffer(), "calls")])
def test_a_model_that_leaves_a_change_behind_is_refused(model: nn.Module, place: str) -> None:
    with pytest.raises(CaptureError) as caught:
        captured_from(model.eval(), X)
    message = str(caught.value)
    assert type(model).__name__ in message
    assert "changes no input and no buffer" in message
    assert f"got a change of {place}" in message


def described(captured: CapturedGraph) -> list[str]:
    """The code, and what the nodes say of themselves."""
    nodes = [(n.name, n.meta.get("val"), [*n.meta], module_path(n)) for n in captured.graph.nodes]
    return [captured.module.code, *map(str, nodes)]


@pytest.mark.slow
def test_tests_capture_what_a_user_does(
    diffusers_recording: Recording, diffusers_dit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave out code that never runs: see `quick_exports`."""
    quick = capture(diffusers_dit, diffusers_recording.signature)
    monkeypatch.setattr(fx.GraphModule, "recompile", RECOMPILE)
    assert described(capture(diffusers_dit, diffusers_recording.signature)) == described(quick)
