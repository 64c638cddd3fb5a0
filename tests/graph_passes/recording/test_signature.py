"""One call of a model as a flat list of named tensors, and back."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn

from calicache.graph_passes.common.errors import RecordError, RunError
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import (
    CallSignature,
    TensorSpec,
    describe,
    flatten_call,
)


class Denoiser(nn.Module):
    def forward(
        self, x: Tensor, timestep: Tensor, cond: Any = None, scale: float = 1.0, **more: Any
    ) -> Any:
        return x, timestep, cond, scale, more


class Loose(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor) -> Any:
        return x, rest


X, T = torch.zeros(2, 3), torch.tensor([5, 5])


def flat(*args: Any, **kwargs: Any) -> Any:
    return flatten_call(Denoiser(), args, kwargs)


def same(a: Any, b: Any) -> bool:
    """Equal in structure, type and value."""
    if isinstance(a, Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_positional_keyword_and_default_arguments_give_one_signature() -> None:
    expected = flat(X, T, None, 1.0).signature()
    assert flat(X, T).signature() == expected
    assert flat(timestep=T, x=X).signature() == expected
    assert flat(X, scale=1.0, timestep=T, cond=None).signature() == expected


def test_tensors_stand_in_the_order_of_the_models_own_signature() -> None:
    signature = flat(cond=X, timestep=T, x=X).signature()
    assert [spec.name for spec in signature.tensors] == ["x", "timestep", "cond"]
    assert signature.order == ("x", "timestep", "cond", "scale")


def test_nested_arguments_get_dotted_names() -> None:
    call = flat(X, T, cond={"text": [X, None], "size": (3, {"flag": True})})
    assert list(call.tensors) == ["x", "timestep", "cond.text.0"]
    assert call.constants == {
        "cond.text.1": None,
        "cond.size.0": 3,
        "cond.size.1.flag": True,
        "scale": 1.0,
    }


def test_extra_keywords_keep_their_own_names() -> None:
    assert list(flat(X, T, guidance=X).tensors) == ["x", "timestep", "guidance"]


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.builds(lambda size: torch.ones(size), st.integers(0, 3))
)
keys = st.text(alphabet="abc_ ", min_size=1, max_size=4)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(tree=trees)
def test_unflatten_undoes_flatten_also_by_way_of_json(tree: Any) -> None:
    call = flat(X, T, cond=tree)
    adapter = TypeAdapter(CallSignature)
    signature = call.signature()
    loaded = adapter.validate_json(adapter.dump_json(signature))
    for form in (signature, loaded):
        arguments = form.unflatten(list(call.tensors.values()))
        assert same(arguments, {"x": X, "timestep": T, "cond": tree, "scale": 1.0})


def test_named_tuples_are_refused() -> None:
    pair = namedtuple("pair", "first second")(X, T)
    with pytest.raises(RecordError, match=r"record: cond: expected .* plain dict.* got pair\."):
        flat(X, T, cond=pair)


def test_two_arguments_of_one_dotted_name_are_refused() -> None:
    with pytest.raises(RecordError, match=r"record: cond\.a\.b: expected .* got .*"):
        flat(X, T, cond={"a.b": X, "a": {"b": torch.ones(1)}})


def test_recorded_call_can_be_made_again(dit: nn.Module, dit_recording: Recording) -> None:
    call = dit_recording.calls[2]
    arguments = dit_recording.signature.unflatten(list(call.values()))
    again = dit(**arguments)
    expected = dit(call["hidden_states"], call["timestep"], call["class_labels"])
    # The same operations on the same values: bitwise.
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_unsupported_object_is_refused_by_name() -> None:
    with pytest.raises(RecordError) as caught:
        flat(X, T, cond={"draw": [torch.Generator()]})
    message = str(caught.value)
    assert message.startswith("record: cond.draw.0: expected a tensor, ")
    assert "got Generator. Pass plain values" in message


def test_values_without_a_name_are_refused() -> None:
    with pytest.raises(RecordError) as caught:
        flatten_call(Loose(), (X, T), {})
    message = str(caught.value)
    assert "record: *rest: expected arguments with names, got 1 values" in message
    assert "Call the model with keyword arguments." in message


def test_model_with_unused_star_args_is_accepted() -> None:
    assert flatten_call(Loose(), (X,), {}).order == ("x",)


def test_wrong_call_fails_as_the_model_itself_would() -> None:
    with pytest.raises(TypeError, match="timestep"):
        flat(X)


# --- match: a later call against the recorded form ---------------------------------------------


def test_a_call_is_arranged_as_the_form_whatever_the_order_of_its_keywords() -> None:
    signature = flat(X, T, cond={"a": X, "b": T}, first=X, second=T).signature()
    call = flat(X, T, second=T, first=X, cond={"b": T, "a": X})
    assert call.signature() != signature
    arranged = call.arranged(signature)
    assert arranged.signature() == signature
    expected = [X, T, X, T, X, T]
    pairs = zip(arranged.tensors.values(), expected, strict=True)
    assert all(got is wanted for got, wanted in pairs)


def test_a_call_with_other_arguments_is_left_as_it_is() -> None:
    call = flat(X, T, extra=X)
    assert call.arranged(flat(X, T).signature()) is call


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(5, 4)},
        {"x": X.double()},
        {"scale": 2.0},
        {"extra": 3},
        {"cond": {"note": "a"}},
    ],
)
def test_other_sizes_precisions_and_constants_are_kin(other: dict[str, Any]) -> None:
    signature = flat(X, T).signature()
    signature.check_kin(flat(**{"x": X, "timestep": T, **other}).signature())


def test_lists_of_other_lengths_are_kin() -> None:
    signature = flat(X, T, images=[X, X]).signature()
    signature.check_kin(flat(X, T, images=[X, X, X]).signature())


@pytest.mark.parametrize(
    ("kwargs", "place", "expected", "got"),
    [
        ({"x": torch.zeros(2, 3, 4)}, "argument x", "float32 (2, 3)", "float32 (2, 3, 4)"),
        ({"x": X.long()}, "argument x", "float32 (2, 3)", "int64 (2, 3)"),
        ({"scale": X}, "argument scale", "no tensor", "float32 (2, 3)"),
        ({"timestep": 5}, "argument timestep", "a tensor int64 (2,)", "5"),
        ({"cond": {"text": X}}, "argument cond.text", "no tensor", "float32 (2, 3)"),
        ({"extra": X}, "argument extra", "no tensor", "float32 (2, 3)"),
    ],
)
def test_other_tensors_are_no_kin(
    kwargs: dict[str, Any], place: str, expected: str, got: str
) -> None:
    signature = flat(X, T).signature()
    with pytest.raises(RunError) as caught:
        signature.check_kin(flat(**{"x": X, "timestep": T, **kwargs}).signature())
    error = caught.value
    assert (error.where, error.expected, error.got) == (place, expected, got)


def test_the_first_difference_has_a_name() -> None:
    signature = flat(X, T).signature()
    other = flat(torch.zeros(5, 3), T, scale=2.0).signature()
    assert signature.difference(other) == ("x", "float32 (2, 3)", "float32 (5, 3)")
    assert signature.difference(signature)[0] == "call"


# --- specs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_dtype_goes_through_its_name(dtype: torch.dtype) -> None:
    assert describe("x", torch.zeros(2, 3).to(dtype)).torch_dtype is dtype


@pytest.mark.parametrize("name", ["nonsense", "nn", ""])
def test_unknown_dtype_name_is_refused(name: str) -> None:
    with pytest.raises(RecordError) as caught:
        _ = TensorSpec("x", (2,), name).torch_dtype
    assert f"record: x: expected a torch dtype name, got {name}. Record again." in str(caught.value)


def test_spec_reads_as_dtype_and_shape() -> None:
    assert str(describe("x", X)) == "float32 (2, 3)"
