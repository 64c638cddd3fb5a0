"""The driver of all lowerings: what a rule sees, and what is left of the graph afterwards."""

from __future__ import annotations

import torch
from support.toys import targets, trace, written
from torch import Tensor, fx, nn

from calicache.export.lowerings.rewriting import Lowering, NewNodes, Rule

aten = torch.ops.aten


class Scaled(nn.Module):
    """Two weights, the second of which is added only to be taken away by a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.shift).exp()


def every_node(rule: Rule) -> Lowering:
    return Lowering(lambda: rule, lambda _: True)


def without_sums(node: fx.Node, _: NewNodes) -> fx.Node | None:
    return node.all_input_nodes[0] if node.target is aten.add.Tensor else None


def test_a_rule_that_says_nothing_leaves_the_graph_as_it_is() -> None:
    module = trace(Scaled(), torch.randn(2, 3))
    copy = every_node(lambda *_: None)(module)
    assert written(copy) == written(module)
    assert copy.graph is not module.graph


def test_what_took_a_nodes_place_is_used_and_what_is_dead_is_gone() -> None:
    x, model = torch.randn(2, 3), Scaled()
    module = trace(model, x)
    before = written(module)
    lowered = every_node(without_sums)(module)
    assert written(module) == before
    assert targets(lowered) == [aten.mul.Tensor, aten.exp.default]
    weights = [node.target for node in lowered.graph.nodes if node.op == "get_attr"]
    assert len(weights) == len(dict(lowered.named_parameters())) == 1  # the shift went with its sum
    (scale,) = lowered.parameters()
    assert scale.data_ptr() == model.scale.data_ptr()
    # The same operations on the same numbers.
    assert torch.equal(lowered(x)[0], (x * model.scale).exp())


def test_later_nodes_see_what_earlier_ones_have_become() -> None:
    sources: list[object] = []

    def doubled(node: fx.Node, new: NewNodes) -> fx.Node | None:
        if node.op != "call_function":
            return None
        sources.append(node.all_input_nodes[0].target)
        return new.call(aten.mul.Tensor, node.args[0], 2.0)

    x = torch.randn(2, 3)
    lowered = every_node(doubled)(trace(lambda x: x.sin().cos(), x))
    assert sources == ["x", aten.mul.Tensor]
    assert torch.equal(lowered(x)[0], x * 4)  # powers of two: exact


def test_new_nodes_say_what_the_one_in_their_place_said_but_for_their_value() -> None:
    half, table = torch.empty(2, 1), torch.ones(2, 1)

    def first_half(node: fx.Node, new: NewNodes) -> fx.Node | None:
        if node.target is not aten.sin.default:
            return None
        sine = new.call(aten.sin.default, node.args[0])
        weight = new.tensor("tables.ones", table, value=half)
        return new.call(aten.mul.Tensor, sine, weight, value=half, options={})

    module = trace(lambda x: x.sin() + 1, torch.randn(2, 1))
    (sine,) = [node for node in module.graph.nodes if node.target is aten.sin.default]
    lowered = every_node(first_half)(module)
    new = {node.target: node for node in lowered.graph.nodes}
    assert new[aten.sin.default].meta["val"] is sine.meta["val"]
    assert new[aten.mul.Tensor].meta["val"] is new["tables.ones"].meta["val"] is half
    assert new[aten.mul.Tensor].meta["nn_module_stack"] == sine.meta["nn_module_stack"]
    assert lowered.get_buffer("tables.ones") is table
