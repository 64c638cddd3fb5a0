"""The graphs of an optimised model by form of call: the plan's own, and others as they come."""

from __future__ import annotations

from threading import Lock
from typing import Any

from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.errors import CalicacheError, RunError, SiteError
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.reads import fits_fixed
from calicache.graph_passes.recording.signature import FlatCall
from calicache.graph_passes.rewriting.compile import Compiled, assign_targets, compile_graphs
from calicache.graph_passes.sites.analysis import Analysis, analyse


class FormTable:
    """Graphs for the plan's own form of call, and for others as they are asked for.

    They share weights and factors: these belong to layers, not to sizes.

    Args:
        original: the model as it was.
        plan: what it runs under.
        own: the graphs for the plan's own form.
        limit: how many other forms are kept, those that were asked for last.
    """

    def __init__(self, original: nn.Module, plan: Plan, own: Compiled, limit: int) -> None:
        self.original, self.plan, self.own, self.limit = original, plan, own, limit
        self._others: list[Compiled] = []  # the newest last
        self._lock = Lock()

    def for_call(self, call: FlatCall) -> Compiled:
        """The graphs for a call like this one.

        Raises:
            RunError: it differs in more than sizes and constants, or the model as it is captured
                for it has other layers.
        """
        signature = call.signature()
        with self._lock:
            for compiled in (self.own, *reversed(self._others)):
                same = compiled.analysis.binding.signature == signature
                if same and fits_fixed(compiled.analysis.fixed, call.tensors):
                    return self._use(compiled)
            binding = self.plan.binding.for_call(self.original, call)
            try:
                recipe = self.plan.recipe
                analysis = analyse(self.original, binding, recipe.include, recipe.exclude)
                return self._use(self._compile(analysis))
            except CalicacheError as error:
                name, expected, got = self.plan.binding.signature.difference(signature)
                raise RunError(
                    f"argument {name}",
                    expected=expected,
                    got=f"{got}, for which the plan has no graph ({error})",
                    fix="Call the model as it was recorded, or record and plan again for this "
                    "call.",
                ) from error

    def for_binding(self, binding: Binding) -> Compiled:
        """The graphs for calls of another form.

        Raises:
            CalicacheError: whatever stage refuses names itself.
        """
        with self._lock:
            for compiled in (self.own, *self._others):
                if compiled.analysis.binding == binding:
                    return self._use(compiled)
            recipe, workspace = self.plan.recipe, self.plan.workspace
            patterns = recipe.include, recipe.exclude
            return self._use(self._compile(workspace.analysis(self.original, binding, *patterns)))

    def forget(self) -> None:
        """Drop all other forms: the weights have gone elsewhere."""
        self._others.clear()

    def _use(self, compiled: Compiled) -> Compiled:
        if compiled is not self.own:
            others = [other for other in self._others if other is not compiled]
            self._others = [*others, compiled][-self.limit :]
        return compiled

    def _compile(self, analysis: Analysis) -> Compiled:
        recipe = self.plan.recipe
        assignment = assign_targets(analysis, recipe)
        own, others = ([t.name for t in of.targets] for of in (self.own, assignment))
        if own != others:
            raise SiteError(
                min(set(own) ^ set(others), default="order"),
                expected=f"the {len(own)} calibration targets of the plan",
                got=f"{len(others)}, others",
                fix="Record and plan with this form of call.",
            )
        weight = next(analysis.captured.module.parameters())
        factors = {name: value.to(weight) for name, value in self.own.factors.items()}
        return compile_graphs(analysis, recipe, assignment, factors)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_others": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())
