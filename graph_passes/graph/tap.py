"""Running a graph and looking at values inside it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import fx


class Tap(fx.Interpreter):
    """Runs a graph and tells the values of some of its nodes, each as soon as it is known."""

    def __init__(
        self, module: fx.GraphModule, nodes: Collection[str], tell: Callable[[str, Any], None]
    ) -> None:
        super().__init__(module)
        self.extra_traceback = False  # errors are told in our own words
        self.nodes, self.tell = nodes, tell

    def run_node(self, n: fx.Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.name in self.nodes:
            self.tell(n.name, value)
        return value
