"""Complex values as pairs of real ones, which is all that ONNX knows.

Rotary positions are often written with complex numbers: view_as_complex(q) * table. Here a value
of shape S becomes a real one of shape (*S, 2), real part first; what reorders or cuts it does the
same to the pairs. Operations that are not in the list are left for the exporter to refuse.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calicache.graph_passes.graph.surgery import copy_graph, finish, read_attribute

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


def lower_complex(module: fx.GraphModule) -> fx.GraphModule:
    """A copy without complex values; the module itself where one of its operations is not known.

    Args:
        module: nodes describe their values; it is not changed.
    """
    graph, _ = copy_graph(module.graph)
    pairs: dict[fx.Node, fx.Node] = {}
    tables: dict[str, Tensor] = {}
    for node in list(graph.nodes):
        complex_ = _is_complex(node)
        if not (complex_ or any(source in pairs for source in node.all_input_nodes)):
            continue
        with graph.inserting_before(node):
            made = _in_pairs(node, pairs, module, tables)
        if made is None:
            return module
        if complex_:
            pairs[node] = made
        else:
            node.replace_all_uses_with(made)
    for target in {str(n.target) for n in graph.nodes if n.op == "get_attr"} - set(tables):
        tables[target] = read_attribute(module, target)  # type: ignore[assignment]
    return fx.GraphModule(tables, finish(graph)) if pairs else module


def _in_pairs(
    node: fx.Node,
    pairs: Mapping[fx.Node, fx.Node],
    module: fx.GraphModule,
    tables: dict[str, Tensor],
) -> fx.Node | None:
    """The node over pairs, inserted at the graph's place; None for one that is not known."""
    graph, target = node.graph, node.target
    if node.op == "get_attr":
        value = read_attribute(module, str(target))
        assert isinstance(value, Tensor)
        name = f"{target}_pairs"
        tables[name] = torch.view_as_real(value.detach().resolve_conj()).contiguous()
        return _described(graph.get_attr(name), node)
    if node.op == "placeholder":
        return _described(node, node)
    if node.op != "call_function" or not _is_known(node, pairs):
        return None
    sources = [pairs.get(n, n) if isinstance(n, fx.Node) else n for n in node.args]
    if target in SAME:
        return sources[0] if isinstance(sources[0], fx.Node) else None
    if target in SHAPING:
        return _described(_shaped(node, pairs), node)
    known: dict[Any, Callable[..., fx.Node]] = {
        aten.complex.default: _joined,
        aten.gather.default: _gathered,
        aten.polar.default: _turned,
        aten.mul.Tensor: _product,
        aten._conj.default: _mirrored,
        aten.real.default: lambda z: _part(z, 0),
        aten.imag.default: lambda z: _part(z, 1),
    }
    if target not in known:
        return None
    if target is aten.mul.Tensor and not all(n in pairs for n in node.args):
        return _described(_scaled(node, pairs), node)
    return _described(known[target](*sources), node)


def _is_known(node: fx.Node, pairs: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether a node mixes complex values with nothing that would need another form."""
    if any(isinstance(argument, complex) for argument in node.args):
        return False
    values = [n for n in node.args if isinstance(n, fx.Node)]
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return len(values) == 2 and all(n in pairs for n in values)
    if node.target is aten.complex.default:
        return bool(values[0].meta["val"].shape == values[1].meta["val"].shape)
    if node.target in SAME - {aten.view_as_complex.default, aten.view_as_real.default}:
        return values[0] in pairs and _real(values[0]) == _real(node)
    if node.target in SCATTERS:
        return all(n in pairs for n in values[:2])
    return True


def _shaped(node: fx.Node, pairs: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The same reordering or cut, with the pairs' dimension left where it is: last."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: pairs.get(n, n))
    if node.target is operator.getitem:
        return node.graph.call_function(operator.getitem, args)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema}
    given |= dict(zip(given, args, strict=False)) | kwargs
    for name, value in given.items():
        if name in DIMENSIONS and isinstance(value, int) and value < 0:
            given[name] = value - 1
        elif name in SIZES:
            given[name] = [*value, SIZES[name]]
        elif name == "dims":
            given[name] = [*(d % len(value) for d in value), len(value)]
        elif name == "dtype" and isinstance(value, torch.dtype) and value.is_complex:
            given[name] = value.to_real()
    positional = tuple(given[a.name] for a in schema if not a.kwarg_only)
    named = {a.name: given[a.name] for a in schema if a.kwarg_only and a.name in node.kwargs}
    return node.graph.call_function(node.target, positional, named)  # type: ignore[arg-type]


def _part(pair: fx.Node, place: int) -> fx.Node:
    return pair.graph.call_function(aten.select.int, (pair, -1, place))


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

    def times(left: fx.Node, right: fx.Node) -> fx.Node:
        return call(aten.mul.Tensor, (left, right))

    real = call(aten.sub.Tensor, (times(a, c), times(b, d)))
    return _joined(real, call(aten.add.Tensor, (times(a, d), times(b, c))))


def _scaled(node: fx.Node, pairs: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A complex value times a real one."""
    call = node.graph.call_function
    factors: list[Any] = []
    for factor in node.args:
        if isinstance(factor, fx.Node) and factor not in pairs:
            factors.append(call(aten.unsqueeze.default, (factor, -1)))
        else:
            factors.append(pairs.get(factor, factor) if isinstance(factor, fx.Node) else factor)
    return call(aten.mul.Tensor, tuple(factors))


def _described(made: fx.Node, like: fx.Node) -> fx.Node:
    """With a value of the shape that the pairs have."""

    def real(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [real(part) for part in value]
        if isinstance(value, Tensor) and value.is_complex():
            return value.new_empty((*value.shape, 2), dtype=value.dtype.to_real())
        return value

    made.meta["val"] = real(like.meta["val"])
    return made


def _real(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype.to_real() if dtype.is_complex else dtype


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, Tensor) and v.is_complex() for v in values)
