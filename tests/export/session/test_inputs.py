"""What is handed to a session: copied, at one address, complex values as pairs, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from calicache.export.session.inputs import InputBuffers, checked_inputs, in_pairs
from calicache.graph_passes.common.errors import RunError
from calicache.graph_passes.recording.signature import TensorSpec

SPECS = (TensorSpec("x", (2, 3), "float32"), TensorSpec("timestep", (2,), "int64"))


@pytest.fixture
def buffers() -> InputBuffers:
    return InputBuffers("cpu")


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def doubled(value: ort.OrtValue, shape: tuple[int, ...]) -> np.ndarray:
    """2 x, as ONNX Runtime reads the buffer."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString())
    return session.run_with_ort_values(None, {"x": value})[0].numpy()


# --- buffers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, np.int64, np.bool_])
@pytest.mark.parametrize("shape", [(2, 3), (1,), ()])
def test_the_buffer_holds_the_value(buffers: InputBuffers, shape: Any, dtype: Any) -> None:
    value = np.asarray(draw(*shape) * 3).astype(dtype)
    held = buffers.fill("x", value)
    assert held.device_name() == "cpu"
    assert (held.numpy().dtype, held.numpy().shape) == (value.dtype, value.shape)
    assert np.array_equal(held.numpy(), value)


def test_the_address_stays_and_the_values_change(buffers: InputBuffers) -> None:
    first = buffers.fill("x", draw(2, 3))
    address = first.data_ptr()
    second = buffers.fill("x", draw(2, 3) + 1)
    assert second is first
    assert second.data_ptr() == address
    assert np.array_equal(doubled(first, (2, 3)), 2 * (draw(2, 3) + 1))  # exact: x + x


def test_another_shape_has_a_buffer_of_its_own(buffers: InputBuffers) -> None:
    small = buffers.fill("x", draw(2, 3))
    large = buffers.fill("x", draw(4, 3))
    assert large is not small
    assert tuple(large.shape()) == (4, 3)
    assert np.array_equal(small.numpy(), draw(2, 3))  # whoever still holds it keeps its values


def test_another_dtype_has_a_buffer_of_its_own(buffers: InputBuffers) -> None:
    buffers.fill("x", draw(2, 3))
    for dtype in (np.float64, np.int32):  # other sizes, and the same one
        value = (draw(2, 3) * 3).astype(dtype)
        held = buffers.fill("x", value)
        assert held.numpy().dtype == dtype
        assert np.array_equal(held.numpy(), value)


def test_inputs_of_other_names_are_kept_apart(buffers: InputBuffers) -> None:
    one, two = buffers.fill("x", draw(2)), buffers.fill("y", draw(2) + 1)
    assert one.data_ptr() != two.data_ptr()
    assert np.array_equal(one.numpy(), draw(2))
    assert np.array_equal(two.numpy(), draw(2) + 1)


def test_what_the_caller_does_later_changes_nothing(buffers: InputBuffers) -> None:
    value = draw(2, 3)
    held = buffers.fill("x", value)
    value[:] = 0
    assert np.array_equal(held.numpy(), draw(2, 3))


@pytest.mark.parametrize(
    "value",
    [draw(3, 2).T, draw(4, 3)[::2], draw(2, 6)[:, ::2], np.broadcast_to(draw(3), (2, 3))],
    ids=["transposed", "rows", "columns", "broadcast"],
)
def test_values_may_lie_in_memory_as_they_like(buffers: InputBuffers, value: np.ndarray) -> None:
    assert np.array_equal(buffers.fill("x", value).numpy(), value)


# --- complex values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "part"), [(np.complex64, np.float32), (np.complex128, np.float64)]
)
@pytest.mark.parametrize("shape", [(2, 3), (1,), ()])
def test_complex_values_are_pairs_as_torch_has_them(shape: Any, dtype: Any, part: Any) -> None:
    value = np.asarray(draw(*shape) + 1j * (draw(*shape) + 1)).astype(dtype)
    pairs = in_pairs(value)
    assert (pairs.dtype, pairs.shape) == (part, (*shape, 2))
    assert np.array_equal(pairs, torch.view_as_real(torch.from_numpy(value)).numpy())


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_real_values_are_left_alone(dtype: Any) -> None:
    value = draw(2, 3).astype(dtype)
    assert in_pairs(value) is value


def test_the_buffer_of_a_complex_input_holds_pairs(buffers: InputBuffers) -> None:
    value = (draw(2, 3) + 1j * (draw(2, 3) + 1)).astype(np.complex64)
    held = buffers.fill("z", value)
    assert tuple(held.shape()) == (2, 3, 2)
    again = buffers.fill("z", value.conj())
    assert again is held
    assert np.array_equal(held.numpy(), in_pairs(value.conj()))
    assert np.array_equal(doubled(held, (2, 3, 2)), 2 * in_pairs(value.conj()))  # exact: x + x


# --- checks --------------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    return {"x": draw(2, 3), "timestep": np.array([5, 5])}


def test_right_inputs_are_passed_on_in_the_order_of_the_specs() -> None:
    inputs = good()
    feed = checked_inputs(SPECS, dict(reversed(inputs.items())))
    assert list(feed) == ["x", "timestep"]
    assert all(feed[name] is inputs[name] for name in inputs)


def test_what_is_like_an_array_is_taken_as_one() -> None:
    feed = checked_inputs(SPECS, {"x": torch.zeros(2, 3), "timestep": [5, 5]})
    assert isinstance(feed["x"], np.ndarray)
    assert feed["timestep"].tolist() == [5, 5]


def test_gradients_and_views_of_tensors_stay_behind() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    feed = checked_inputs(SPECS, {"x": x.T, "timestep": torch.tensor([5, 5])})
    assert np.array_equal(feed["x"], x.detach().T.numpy())
    z = torch.randn(2, 3, dtype=torch.complex64)
    (spec,) = (TensorSpec("z", (2, 3), "complex64"),)
    assert np.array_equal(checked_inputs([spec], {"z": z.conj()})["z"], z.numpy().conj())


@pytest.mark.parametrize(
    ("change", "name", "got"),
    [
        ({"y": draw(1)}, "y", "another name"),
        ({"x": None}, "x", "nothing"),
        ({"x": draw(3, 2)}, "x", r"float32 \(3, 2\)"),
        ({"x": draw(2, 3).astype(np.float64)}, "x", r"float64 \(2, 3\)"),
        ({"timestep": 5}, "timestep", r"int64 \(\)"),
        ({"x": torch.zeros(2, 3).bfloat16()}, "x", r"no array \(TypeError: .*BFloat16"),
        ({"x": torch.zeros(2, 3).to_sparse()}, "x", r"no array \(TypeError: .*[sS]parse"),
        ({"x": torch.zeros(2, 3, device="meta")}, "x", r"no array \(\w+Error: .*[mM]eta"),
        ({"x": [[1.0], [1.0, 2.0]]}, "x", r"no array \(ValueError: .*inhomogeneous"),
        ({"x": object()}, "x", r"object \(\)"),
        ({"x": "text"}, "x", r"<U4 \(\)"),
    ],
    ids=[
        *("unknown", "missing", "shape", "dtype", "no dimension", "bfloat16", "sparse", "meta"),
        *("ragged", "object", "text"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], name: str, got: str) -> None:
    inputs = {n: value for n, value in (good() | change).items() if value is not None}
    with pytest.raises(RunError, match=f"input {name}: .* got {got}"):
        checked_inputs(SPECS, inputs)
