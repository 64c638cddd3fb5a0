"""What stays the same over a run and takes products to make: text projections, caption embedders.

An exact pass. REFRESH makes these values and keeps them; the cheap modes read them instead of
making them again at every step. What costs no product (a label embedding) is left in place.
"""

from __future__ import annotations

from collections.abc import Mapping

from calicache.graph_passes.graph.capture import CapturedGraph
from calicache.graph_passes.graph.operations import before_views
from calicache.graph_passes.recording.input_classes import Dependence


def find_run_values(
    captured: CapturedGraph, classes: Mapping[str, Dependence], macs: Mapping[str, int]
) -> tuple[str, ...]:
    """Names of the nodes to keep over a run, in graph order.

    Args:
        captured: the plain graph.
        classes: of every node, from `classify_nodes`.
        macs: multiply-accumulates of every node, by name.

    Returns:
        Nodes of class `run` that others of class `step` or `latent` use, directly or through
        views, and that products have gone into.
    """
    costly: set[str] = set()
    frontier: dict[str, None] = {}
    for node in captured.graph.nodes:
        if node.op == "output":
            continue
        sources = node.all_input_nodes
        if classes[node.name] is Dependence.RUN:
            if macs.get(node.name) or any(source.name in costly for source in sources):
                costly.add(node.name)
        elif classes[node.name] in (Dependence.STEP, Dependence.LATENT):
            frontier |= {before_views(s).name: None for s in sources if s.name in costly}
    return tuple(node.name for node in captured.graph.nodes if node.name in frontier)
