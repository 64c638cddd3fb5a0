"""How one call of a model becomes a flat list of named tensors, and back.

Models take positional arguments, keywords, nested dicts and lists. Everything after this
module sees one form: an ordered mapping from a dotted name to a tensor, with the other
values (None, numbers, strings) frozen into the signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calicache.graph_passes.common.disk.bounds import Shape
from calicache.graph_passes.common.errors import CalicacheError, RecordError, RunError
from calicache.graph_passes.recording.call_tree import CallTree, flatten, leaf_names, unflatten

Constant = None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor argument, such as `hidden_states: float32 (4, 1, 28, 28)`."""

    name: str
    shape: Shape
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's own object."""
        dtype = getattr(torch, self.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise RecordError(
                self.name, expected="a torch dtype name", got=self.dtype, fix="Record again."
            )
        return dtype

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


@dataclass(frozen=True, slots=True)
class ConstantSpec:
    """One argument that is not a tensor and the same in every call."""

    name: str
    value: Constant


@dataclass(frozen=True, slots=True)
class CallSignature:
    """The form of a call.

    Attributes:
        tensors: the tensor arguments, in the order of the model's own signature.
        constants: the other arguments, in the same order.
        order: names of all arguments as the flattened call has them.
        tree: the nesting of the arguments.

    Raises:
        RecordError: the names do not belong to one another.
    """

    tensors: tuple[TensorSpec, ...]
    constants: tuple[ConstantSpec, ...]
    order: tuple[str, ...]
    tree: CallTree

    def __post_init__(self) -> None:
        named = [spec.name for spec in self.tensors] + [spec.name for spec in self.constants]
        if sorted(named) != sorted(self.order) or [*leaf_names(self.tree)] != [*self.order]:
            raise RecordError(
                "signature",
                expected="the same arguments by name, in order and in the nesting",
                got=f"{len(named)} names, {len(self.order)} in order",
                fix="Record again.",
            )

    def unflatten(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Keyword arguments for the model from tensors in the order of `self.tensors`."""
        values: dict[str, Any] = {spec.name: spec.value for spec in self.constants}
        values |= dict(zip((spec.name for spec in self.tensors), tensors, strict=True))
        arguments: dict[str, Any] = unflatten(self.tree, iter([values[n] for n in self.order]))
        return arguments

    def check_kin(self, other: CallSignature) -> None:
        """Refuse a form that differs from this one in more than sizes, precision and constants.

        Sizes are shapes, and how many values a list has; precision is another floating-point
        dtype, as after a cast.

        Raises:
            RunError: other tensors, or another kind of number or number of dimensions.
        """
        own, others = self.by_pattern(), other.by_pattern()
        constants = {constant.name: repr(constant.value) for constant in other.constants}
        for name, spec in own.items():
            got = others.get(name)
            if got is None:
                raise _mismatch(name, f"a tensor {spec}", constants.get(name, "none"))
            if not _same_kind(got, spec) or len(got.shape) != len(spec.shape):
                raise _mismatch(name, str(spec), str(got))
        for name in sorted(set(others) - set(own)):
            raise _mismatch(name, "no tensor", str(others[name]))

    def by_pattern(self) -> dict[str, TensorSpec]:
        """A tensor of every list, and those outside of lists, by `name_pattern`."""
        return {name_pattern(spec.name): spec for spec in self.tensors}

    def difference(self, other: CallSignature) -> tuple[str, str, str]:
        """The first argument of another form that differs: its name, what it was, what it is."""
        own, others = self._by_name(), other._by_name()
        name = next((n for n in {**own, **others} if own.get(n) != others.get(n)), "call")
        return name, str(own.get(name, "none")), str(others.get(name, "none"))

    def _by_name(self) -> dict[str, TensorSpec | ConstantSpec]:
        specs: tuple[TensorSpec | ConstantSpec, ...] = (*self.tensors, *self.constants)
        return {spec.name: spec for spec in specs}


@dataclass(frozen=True, slots=True)
class FlatCall:
    """One call, flattened: tensors and constants by dotted name, and the nesting."""

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Constant]
    order: tuple[str, ...]
    tree: CallTree

    def signature(self) -> CallSignature:
        """The form of this call."""
        return CallSignature(
            tensors=tuple(describe(name, value) for name, value in self.tensors.items()),
            constants=tuple(ConstantSpec(name, value) for name, value in self.constants.items()),
            order=self.order,
            tree=self.tree,
        )

    def arranged(self, signature: CallSignature) -> FlatCall:
        """The same call in the order of a form, whatever the order of keywords and dict keys."""
        tensors = [spec.name for spec in signature.tensors]
        constants = [spec.name for spec in signature.constants]
        if self.tensors.keys() != set(tensors) or self.constants.keys() != set(constants):
            return self
        return FlatCall(
            {name: self.tensors[name] for name in tensors},
            {name: self.constants[name] for name in constants},
            signature.order,
            signature.tree,
        )


def describe(name: str, tensor: Tensor) -> TensorSpec:
    """The spec of a tensor: `describe("x", torch.zeros(2, 3))` is `float32 (2, 3)`."""
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def name_pattern(name: str) -> str:
    """The name of an argument with its places in lists left out: `x.0.mask` is `x.#.mask`."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def flatten_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> FlatCall:
    """Bind a call to the model's own signature, fill in defaults, flatten.

    Raises:
        RecordError: an argument is neither tensor, number, string nor None, or the model
            takes `*args`.
    """
    bound = inspect.signature(_unwrapped(model).forward).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            arguments[name] = value
        elif value:
            raise RecordError(
                f"*{name}",
                expected="arguments with names",
                got=f"{len(value)} values without a name",
                fix="Call the model with keyword arguments.",
            )
    tensors: dict[str, Tensor] = {}
    constants: dict[str, Constant] = {}
    tree, leaves = flatten(arguments)
    for name, value in leaves.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif value is None or isinstance(value, bool | int | float | str):
            constants[name] = value
        else:
            raise RecordError(
                name,
                expected="a tensor, a number, a string, None, or a plain dict, list or tuple",
                got=type(value).__name__,
                fix="Pass plain values, or record a module that has the object as an attribute and "
                "passes it on, for a plan of REFRESH and FORECAST steps.",
            )
    assert tree is not None  # of a dict
    return FlatCall(tensors, constants, tuple(leaves), tree)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module that names its arguments, inside of torch.compile and peft."""
    inner: object = getattr(model, "_orig_mod", None)
    if inner is None and callable(base := getattr(model, "get_base_model", None)):
        inner = base()
    return _unwrapped(inner) if isinstance(inner, nn.Module) and inner is not model else model


def _same_kind(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors are of one dtype, or both of floating-point numbers."""
    floats = one.torch_dtype.is_floating_point and other.torch_dtype.is_floating_point
    return floats or one.dtype == other.dtype


def _mismatch(where: str, expected: str, got: str) -> CalicacheError:
    return RunError(
        f"argument {where}",
        expected=expected,
        got=got,
        fix="Call the model as it was recorded, or record and plan again for this call.",
    )
