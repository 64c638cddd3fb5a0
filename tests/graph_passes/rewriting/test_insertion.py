"""The nodes that a rewrite adds: their arguments, their names, what they say about themselves."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
import torch.nn.functional as F
from support.analyses import noise_analysis, targets_of
from support.factors import factors_of
from support.models import Branch
from torch import Tensor, fx, nn

from calicache.graph_passes import Recording, StepMode
from calicache.graph_passes.graph.operations import LINEAR
from calicache.graph_passes.graph.surgery import read_attribute
from calicache.graph_passes.rewriting.insertion import Insertion, cache_name
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.settings.schedule import anchor_table, output_table
from calicache.graph_passes.sites.analysis import Analysis

REFRESH, CALIBRATE, REUSE, FORECAST = StepMode

SCHEDULE = (REFRESH, CALIBRATE, REFRESH, REUSE, REFRESH, FORECAST)


def emit(analysis: Analysis, *, fold: bool, order: int = 0, mix: bool = False) -> VariantSet:
    captured, sites = analysis.captured, analysis.sites
    targets = targets_of(analysis, 2)
    factors = factors_of(captured, targets, {})
    return rewrite(
        captured,
        sites,
        targets,
        factors,
        set(StepMode) if mix else set(StepMode) - {StepMode.FORECAST},
        folded=frozenset(factors if fold else ()),
        anchors=anchor_table(SCHEDULE, order),
        outputs=output_table(SCHEDULE, order) if mix else None,
    )


def expression(value: object, known: Collection[str] = ()) -> str:
    """A value of a graph as nested calls; nodes in `known` are written by name alone."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(expression(item, known) for item in value)}]"
    if not isinstance(value, fx.Node):
        return str(value)
    if value.op in ("placeholder", "get_attr") or value.name in known:
        return str(value.target if value.op == "get_attr" else value.name)
    name = str(value.target).removeprefix("aten.").split(".")[0]
    return f"{name}({', '.join(expression(arg, known) for arg in value.args)})"


class Adapter(Branch):
    """A layer with low-rank layers inside it, as adapters name them."""

    def __init__(self) -> None:
        super().__init__()
        self.second.down, self.second.up = nn.Linear(16, 2), nn.Linear(2, 8)

    def branch(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        return torch.tanh(self.second(x) + self.second.up(self.second.down(x)))


def calibrated_first(*, fold: bool) -> tuple[str, str, str]:
    """What the GELU reads on a CALIBRATE step, and the names of A and B."""
    graph = emit(noise_analysis(Branch()), fold=fold).variants[CALIBRATE].module.graph
    gelu = next(node for node in graph.nodes if node.name == "gelu")
    down, up = sorted(str(n.target) for n in graph.nodes if "calibration.first" in str(n.target))
    return expression(gelu.args[0], ["layer_norm"]), down, up


def test_nodes_of_a_site_are_exact() -> None:
    got, down, up = calibrated_first(fold=False)
    increment = "reshape(sub(layer_norm, cache_layer_norm), [-1, 8])"
    correction = f"linear(linear({increment}, {down}), {up})"
    assert got == f"reshape(add(cache_linear_1, {correction}), [2, 5, 16])"


def test_nodes_of_a_folded_site_are_exact() -> None:
    got, down, up = calibrated_first(fold=True)
    increment = f"sub(linear(reshape(layer_norm, [-1, 8]), {down}), cache_linear_1_down)"
    assert got == f"reshape(add(cache_linear_1, linear({increment}, {up})), [2, 5, 16])"


@pytest.mark.slow
def test_refresh_applies_down_to_what_the_layer_reads() -> None:
    graph = emit(noise_analysis(Branch()), fold=True).variants[REFRESH].module.graph
    folded, full, *_ = graph.output_node().args[0][1:]
    down = next(str(n.target) for n in graph.nodes if "calibration.first" in str(n.target))
    rows = "reshape(layer_norm, [-1, 8])"
    assert expression(folded, ["layer_norm"]) == f"linear({rows}, {down})"
    assert expression(full, ["layer_norm"]) == f"linear({rows}, first.weight, first.bias)"
    assert folded.args[0] is full.args[0]  # one reshape for both


def test_refresh_reads_the_folded_value_off_a_narrow_output() -> None:
    analysis = noise_analysis(Branch())
    variant_set = emit(analysis, fold=True)
    graph = variant_set.variants[REFRESH].module.graph
    folded = graph.output_node().args[0][1:][[c.folded for c in variant_set.caches].index("second")]
    assert folded.target is LINEAR
    product, read, offset = folded.args
    assert str(product.args[1].target) == "second.weight"
    assert str(read.target).endswith("second.read_factor")
    x = torch.randn(10, 16, dtype=torch.float64)
    weight, bias = (analysis.captured.attribute(f"second.{n}").double() for n in ("weight", "bias"))
    module = variant_set.variants[REFRESH].module
    k, shift = (read_attribute(module, str(n.target)).double() for n in (read, offset))
    down = read_attribute(
        variant_set.variants[CALIBRATE].module, "calibration.second.down_factor"
    ).double()
    # K (W x + b) - K b = A x; the factors are float32.
    torch.testing.assert_close(
        (x @ weight.T + bias) @ k.T + shift, x @ down.T, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("fold", "differences"), [(False, 8), (True, 12)])
def test_siblings_share_what_they_can(dit_analysis: Analysis, fold: bool, differences: int) -> None:
    graph = emit(dit_analysis, fold=fold).variants[CALIBRATE].module.graph
    assert [len(group.sites) for group in dit_analysis.sites.groups] == [3, 1, 1, 1] * 2
    # x - x_ref once a group; A x - z_ref once a site.
    subtractions = [n for n in graph.nodes if n.target is torch.ops.aten.sub.Tensor]
    assert len(subtractions) == differences
    rows = {
        node.args[0]
        for node in graph.nodes
        if node.target is LINEAR and node.meta.get("calibrates", "").startswith("blocks.0.attn.")
        if str(node.args[1].target).rpartition(".")[2].startswith("down")
    }
    assert len(rows) == 2  # one for q, k and v, one for proj


class Watch(fx.Interpreter):
    """Compares every value with what the graph says about it."""

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            said = n.meta["val"]
            assert (value.shape, value.dtype) == (said.shape, said.dtype), n.name
        return value


@pytest.mark.slow
@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("mode", StepMode)
def test_new_nodes_say_what_they_are(
    dit_analysis: Analysis, dit_recording: Recording, mode: StepMode, fold: bool, order: int
) -> None:
    mix = order > 0 or mode is StepMode.FORECAST
    variant_set = emit(dit_analysis, fold=fold, order=order, mix=mix)
    variant = variant_set.variants[mode]
    new_nodes = [node for node in variant.module.graph.nodes if node.name in variant.inserted]
    assert len(new_nodes) > (20 if mode in (REFRESH, CALIBRATE) else 0 if order else -1)
    for node in new_nodes:
        # Weighted sums of kept values belong to no module; everything else does.
        if not (mix and node.target in (torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor)):
            assert node.meta["nn_module_stack"], node.name
    inputs = list(dit_recording.calls[0].values())
    weights = variant_set.weights_of(SCHEDULE.index(mode))
    values = variant_set.read(variant.reads, {}, weights, torch.device("cpu"))
    assert Watch(variant.module).run(*inputs, *values)[0].shape == (4, 1, 28, 28)


def test_new_nodes_name_their_site(dit_analysis: Analysis) -> None:
    variant = emit(dit_analysis, fold=False).variants[CALIBRATE]
    named = [n.meta.get("calibrates") for n in variant.module.graph.nodes if "val" in n.meta]
    # A, its product, B, its product and the sum; the shared x - x_ref is the first sibling's.
    counts = {site.name: named.count(site.name) for site in dit_analysis.sites.linears}
    shared = {group.sites[0] for group in dit_analysis.sites.groups}
    assert counts == {name: 5 + (name in shared) for name in counts}


def test_layers_inside_a_layer_have_factors_of_their_own() -> None:
    analysis = noise_analysis(Adapter())
    assert [s.name for s in analysis.sites.linears] == [
        "first",
        "second",
        "second.down",
        "second.up",
    ]
    module = emit(analysis, fold=False).variants[CALIBRATE].module
    shapes = {
        str(n.target): tuple(n.meta["val"].shape) for n in module.graph.nodes if n.op[0] == "g"
    }
    factors = sorted(shape for name, shape in shapes.items() if "calibration" in name)
    assert factors == sorted([(2, 8), (16, 2), (2, 16), (8, 2), (2, 16), (2, 2), (2, 2), (8, 2)])


def small_graph() -> tuple[fx.Graph, fx.Node, fx.Node]:
    """The graph of y = linear(x, weight), and its x (2, 5, 8) and y (2, 5, 4)."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("weight")
    y = graph.call_function(LINEAR, (x, weight))
    graph.output((y,))
    for node, shape in ((x, (2, 5, 8)), (weight, (4, 8)), (y, (2, 5, 4))):
        node.meta["val"] = torch.zeros(shape, dtype=torch.float64)
    return graph, x, y


def test_caches_come_after_the_arguments_in_the_order_they_are_made() -> None:
    graph, x, y = small_graph()
    insert = Insertion(graph)
    with graph.inserting_before(y):
        first, second = insert.anchor_rows(y), insert.anchor_rows(x)
        assert insert.anchor_rows(y) is first
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    assert names == ["x", cache_name(y.name), cache_name("x")]
    # Rows for a linear layer, any other value as it is.
    assert [tuple(n.meta["val"].shape) for n in (first, second)] == [(10, 4), (2, 5, 8)]
    assert first.meta["val"].dtype == torch.float64
    assert insert.new_nodes == []


def test_linear_over_rows_computes_the_same() -> None:
    graph, _, y = small_graph()
    product = Insertion(graph).linear_over_rows(y)
    graph.eliminate_dead_code()
    graph.lint()
    weight, tokens = torch.randn(4, 8).double(), torch.randn(2, 5, 8).double()
    assert expression(product) == "linear(reshape(x, [-1, 8]), weight)"
    got = fx.GraphModule({"weight": weight}, graph)(tokens)[0]
    # float64 sums over 8 terms.
    torch.testing.assert_close(got, tokens @ weight.T, rtol=1e-12, atol=1e-12)
