"""Artifacts with standard attention: every runtime of ONNX takes them, and gives the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from support.artifacts import exported, graphs
from support.models import relative, sample_dit

from calicache.export import Session, export_onnx, read_manifest
from calicache.graph_passes import OptimizedModel, Plan, Recording, optimize, record
from calicache.graph_passes.common.errors import ExportError

pytestmark = pytest.mark.slow

LAYOUTS = ["step", "pair", "sampler"]
# float32 (6e-8) in another order, some layers deep.
SAME = 1e-5
# One increment in 127 levels may be rounded to the other neighbour: 1 of 127 of one value.
ONE_LEVEL = 2e-3
Feed = dict[str, np.ndarray[Any, Any]]


@pytest.fixture(scope="module")
def finished(dit) -> Recording:
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    return recording


@pytest.fixture(scope="module")
def fast(dit, finished, forecast_plan) -> OptimizedModel:
    """All four modes, order 2, output weights."""
    schedule = forecast_plan.schedule
    return optimize(dit, Plan.from_trajectory(dit, finished, schedule=schedule, rank=4))


@pytest.fixture(scope="module")
def in_integers(dit, finished, forecast_plan) -> OptimizedModel:
    """The same with calibration branches in int8."""
    plan = Plan.from_trajectory(
        dit, finished, schedule=forecast_plan.schedule, rank=4, branch="int8"
    )
    return optimize(dit, plan)


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, fast) -> Path:
    return exported(fast, request.param, attention="standard")


def models(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.onnx"))


def feeds(model: Path) -> Iterator[Feed]:
    """Inputs of a model: of every step that it makes a difference for."""
    inputs = ort.InferenceSession(model).get_inputs()
    steps = range(6) if model.name == "model.onnx" else [1]
    by_name = {value.name: value for value in inputs}
    draw = np.random.default_rng(0)
    known: Mapping[str, Any] = {
        "timestep": np.full(4, 500),
        "class_labels": np.array([4, 7, 10, 10]),
        "guidance_scale": np.array(1.5, np.float32),
    }
    for step in steps if "step" in by_name else [0]:
        yield {
            name: np.array(step)
            if name == "step"
            else known[name]
            if name in known
            else draw.standard_normal(value.shape, np.float32)
            for name, value in by_name.items()
        }


def assert_same(got: Any, expected: Any, bound: float) -> None:
    assert len(got) == len(expected) > 0
    for one, two in zip(got, expected, strict=True):
        assert one.shape == two.shape
        assert relative(torch.tensor(one), torch.tensor(two)) < bound


def test_no_operator_is_outside_of_onnx(folder) -> None:
    for file in models(folder):
        model = onnx.load(file, load_external_data=False)
        nodes = [node for graph in graphs(model.graph) for node in graph.node]
        assert {node.domain for node in nodes} == {""}
        assert {entry.domain for entry in model.opset_import} == {""}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_have_a_standard_form_too(layout: str, in_integers) -> None:
    for file in models(exported(in_integers, layout, attention="standard")):
        model = onnx.load(file, load_external_data=False)
        nodes = [node for graph in graphs(model.graph) for node in graph.node]
        assert {node.domain for node in nodes} == {""}
        corrects = file.name in ("model.onnx", "calibrate.onnx")
        assert ("MatMulInteger" in {node.op_type for node in nodes}) == corrects


def test_the_checker_and_strict_shape_inference_take_it(folder) -> None:
    for file in models(folder):
        onnx.checker.check_model(file, full_check=True)
        model = onnx.load(file)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        shapes = {v.name: v.type.tensor_type.shape for v in inferred.graph.output}
        assert all(d.HasField("dim_value") for shape in shapes.values() for d in shape.dim)


def test_both_branches_of_every_if_have_one_static_form(folder) -> None:
    for file in models(folder):
        nodes = [n for graph in graphs(onnx.load(file).graph) for n in graph.node]
        for node in (node for node in nodes if node.op_type == "If"):
            one, two = [[v.type for v in attribute.g.output] for attribute in node.attribute]
            assert one == two
            assert all(d.dim_value > 0 for form in one for d in form.tensor_type.shape.dim)


def test_bodies_read_no_small_constant_of_the_outer_graph_and_loops_go_on(folder) -> None:
    for file in models(folder):
        model = onnx.load(file, load_external_data=False)
        outer, *inner = graphs(model.graph)
        small = {
            tensor.name
            for tensor in outer.initializer
            if tensor.data_location != onnx.TensorProto.EXTERNAL
        }
        assert small.isdisjoint(name for g in inner for n in g.node for name in n.input)
        constants = {t.name: t for g in (outer, *inner) for t in g.initializer}
        loops = [n for g in (outer, *inner) for n in g.node if n.op_type == "Loop"]
        assert len(loops) == (2 if "sampler" in str(folder) else 0)
        assert all(onnx.numpy_helper.to_array(constants[n.input[1]]).item() is True for n in loops)


def test_the_reference_evaluator_agrees_with_onnx_runtime(folder) -> None:
    for file in models(folder):
        session, reference = ort.InferenceSession(file), ReferenceEvaluator(str(file))
        for feed in feeds(file):
            assert_same(reference.run(None, feed), session.run(None, feed), SAME)


def in_openvino(file: Path) -> Callable[[Feed], list[np.ndarray[Any, Any]]]:
    openvino = pytest.importorskip("openvino")
    # Its own choice on some processors is bfloat16.
    model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(feed: Feed) -> list[np.ndarray[Any, Any]]:
        result = model({value.any_name: feed[value.any_name] for value in model.inputs})
        return [result[place] for place in range(len(model.outputs))]

    return run


def test_openvino_agrees_with_onnx_runtime(folder) -> None:
    for file in models(folder):
        session, run = ort.InferenceSession(file), in_openvino(file)
        for feed in feeds(file):
            assert_same(run(feed), session.run(None, feed), SAME)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_agree_in_all_three(layout: str, in_integers) -> None:
    for file in models(exported(in_integers, layout, attention="standard")):
        feed = next(feeds(file))
        expected = ort.InferenceSession(file).run(None, feed)
        assert_same(ReferenceEvaluator(str(file)).run(None, feed), expected, ONE_LEVEL)
        assert_same(in_openvino(file)(feed), expected, ONE_LEVEL)


@pytest.mark.parametrize("name", ["fast", "in_integers"])
def test_standard_and_fused_give_the_same_run(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    noise, labels = torch.randn(2, 1, 28, 28), torch.tensor([4, 7, 10, 10])
    runs = [
        Session(exported(model, "sampler", attention=attention)).sample(noise, class_labels=labels)
        for attention in ("standard", "fused")
    ]
    assert_same(runs[:1], runs[1:], SAME if name == "fast" else ONE_LEVEL)


def test_an_unknown_attention_is_refused_with_the_valid_ones(fast, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"attention: expected fused \| standard, got 'flash'"):
        export_onnx(fast, tmp_path / "d", attention="flash")


def test_the_manifest_says_what_attention_is_written_with(folder, fast) -> None:
    assert read_manifest(folder).attention == "standard"
    assert read_manifest(exported(fast)).attention == "fused"
