"""Complex values as pairs of real ones, which is all that ONNX knows.

Rotary positions are often written with complex numbers: view_as_complex(q) * table. Here a value
of shape S becomes a real one of shape (*S, 2), real part first; what reorders or cuts it does the
same to the pairs. Operations that are not in the list are left for the exporter to refuse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from calicache.export.lowerings.rewriting import Lowering, NewNodes, NotLoweredError

aten = torch.ops.aten
DIMENSIONS = ("dim", "dim0", "dim1", "start_dim", "end_dim")
SIZES: Mapping[str, int] = {"size": 2, "shape": 2, "repeats": 1}  # of the pairs' own dimension
SHAPING = frozenset(
    {
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.permute.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.index_select.default,
        aten.index.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.cat.default,
        aten.stack.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.reshape.default,
        aten.expand.default,
        aten.repeat.default,
        aten.pad_sequence.default,
        aten.zeros.default,
        aten.new_zeros.default,
        aten.zeros_like.default,
        aten.copy.default,
        aten.index_put.default,
        aten.slice_scatter.default,
        aten.select_scatter.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        operator.getitem,
    }
)
SCATTERS = frozenset({aten.copy.default, aten.slice_scatter.default, aten.select_scatter.default})
SAME = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.resolve_conj.default,
        aten.view_as_complex.default,
        aten.view_as_real.default,
    }
)


@dataclass(frozen=True, slots=True)
class _InPairs:
    """The rule; `pairs` holds what stands for every complex value, which is dead afterwards."""

    pairs: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def __call__(self, node: fx.Node, new: NewNodes) -> fx.Node | None:
        if _is_complex(node):
            self.pairs[node] = self._over_pairs(node, new)
            return None
        if any(source in self.pairs for source in node.all_input_nodes):
            return self._over_pairs(node, new)
        return None

    def _over_pairs(self, node: fx.Node, new: NewNodes) -> fx.Node:
        if node.op == "get_attr":
            table = new.tensors.read(node.target)
            assert isinstance(table, Tensor)
            parts = torch.view_as_real(table.detach().resolve_conj()).contiguous()
            return new.tensor(f"{node.target}_pairs", parts, value=_real_form(node))
        if node.op == "placeholder":
            node.meta["val"] = _real_form(node)
            return node
        if node.op != "call_function" or not self._is_known(node):
            raise NotLoweredError
        arguments = [self.pairs.get(n, n) if isinstance(n, fx.Node) else n for n in node.args]
        if node.target in SAME:
            assert isinstance(arguments[0], fx.Node)
            return arguments[0]
        successor = self._operation(node, arguments)
        successor.meta["val"] = _real_form(node)
        return successor

    def _operation(self, node: fx.Node, arguments: Sequence[Any]) -> fx.Node:
        if node.target in SHAPING:
            return _shaped(node, self.pairs)
        if node.target is aten.mul.Tensor and not all(n in self.pairs for n in node.args):
            return self._scaled(node)
        if node.target not in PRODUCTS:
            raise NotLoweredError
        return PRODUCTS[node.target](*arguments)

    def _is_known(self, node: fx.Node) -> bool:
        """Whether a node mixes complex values with nothing that would need another form."""
        if any(isinstance(argument, complex) for argument in node.args):
            return False
        values = [n for n in node.args if isinstance(n, fx.Node)]
        if node.target in (aten.add.Tensor, aten.sub.Tensor):
            return len(values) == 2 and all(n in self.pairs for n in values)
        if node.target is aten.complex.default:
            return bool(values[0].meta["val"].shape == values[1].meta["val"].shape)
        if node.target in SAME - {aten.view_as_complex.default, aten.view_as_real.default}:
            return values[0] in self.pairs and _real(values[0]) == _real(node)
        if node.target in SCATTERS:
            return all(n in self.pairs for n in values[:2])
        return True

    def _scaled(self, node: fx.Node) -> fx.Node:
        """A complex value times a real one."""
        call = node.graph.call_function
        factors = [
            call(aten.unsqueeze.default, (factor, -1))
            if isinstance(factor, fx.Node) and factor not in self.pairs
            else self.pairs.get(factor, factor)  # type: ignore[arg-type]
            for factor in node.args
        ]
        return call(aten.mul.Tensor, tuple(factors))


def _shaped(node: fx.Node, pairs: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The same reordering or cut, with the pairs' dimension left where it is: last."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: pairs.get(n, n))
    if node.target is operator.getitem:
        return node.graph.call_function(operator.getitem, args)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    call = {argument.name: argument.default_value for argument in schema}
    call |= dict(zip(call, args, strict=False)) | kwargs
    for name, value in call.items():
        if name in DIMENSIONS and isinstance(value, int) and value < 0:
            call[name] = value - 1
        elif name in SIZES:
            call[name] = [*value, SIZES[name]]
        elif name == "dims":
            call[name] = [*(d % len(value) for d in value), len(value)]
        elif name == "dtype" and isinstance(value, torch.dtype) and value.is_complex:
            call[name] = value.to_real()
    positional = tuple(call[a.name] for a in schema if not a.kwarg_only)
    named = {a.name: call[a.name] for a in schema if a.kwarg_only and a.name in node.kwargs}
    return node.graph.call_function(node.target, positional, named)  # type: ignore[arg-type]


def _part(pair: fx.Node, place: int) -> fx.Node:
    return pair.graph.call_function(aten.select.int, (pair, -1, place))


def _real_part(pair: fx.Node) -> fx.Node:
    return _part(pair, 0)


def _imaginary_part(pair: fx.Node) -> fx.Node:
    return _part(pair, 1)


def _joined(real: fx.Node, imaginary: fx.Node) -> fx.Node:
    return real.graph.call_function(aten.stack.default, ([real, imaginary], -1))


def _gathered(pair: fx.Node, dim: int, index: fx.Node) -> fx.Node:
    call, shape = pair.graph.call_function, tuple(index.meta["val"].shape)
    places = call(aten.unsqueeze.default, (index, -1))
    both = call(aten.expand.default, (places, [*shape, 2]))
    return call(aten.gather.default, (pair, dim if dim >= 0 else dim - 1, both))


def _turned(size: fx.Node, angle: fx.Node) -> fx.Node:
    call = size.graph.call_function
    cosine, sine = call(aten.cos.default, (angle,)), call(aten.sin.default, (angle,))
    return _joined(call(aten.mul.Tensor, (size, cosine)), call(aten.mul.Tensor, (size, sine)))


def _mirrored(pair: fx.Node) -> fx.Node:
    call = pair.graph.call_function
    return _joined(_part(pair, 0), call(aten.neg.default, (_part(pair, 1),)))


def _product(first: fx.Node, second: fx.Node) -> fx.Node:
    """(a + bi) (c + di) = (ac - bd) + (ad + bc) i."""
    call = first.graph.call_function
    a, b, c, d = _part(first, 0), _part(first, 1), _part(second, 0), _part(second, 1)
    times = aten.mul.Tensor
    real = call(aten.sub.Tensor, (call(times, (a, c)), call(times, (b, d))))
    imaginary = call(aten.add.Tensor, (call(times, (a, d)), call(times, (b, c))))
    return _joined(real, imaginary)


# What multiplies, takes apart or puts together; the arguments are nodes over pairs.
PRODUCTS: Mapping[Any, Callable[..., fx.Node]] = {
    aten.complex.default: _joined,
    aten.gather.default: _gathered,
    aten.polar.default: _turned,
    aten.mul.Tensor: _product,
    aten._conj.default: _mirrored,
    aten.real.default: _real_part,
    aten.imag.default: _imaginary_part,
}


def _real_form(node: fx.Node) -> Any:
    """The node's value, or a list of them, in the shape that the pairs have."""
    return pytree.tree_map(_form_of_pairs, node.meta["val"])


def _form_of_pairs(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_complex():
        return value.new_empty((*value.shape, 2), dtype=value.dtype.to_real())
    return value


def _real(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype.to_real() if dtype.is_complex else dtype


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, Tensor) and v.is_complex() for v in values)


# A copy without complex values; the module itself where none is or an operation is not known.
lower_complex = Lowering(_InPairs, _is_complex)
