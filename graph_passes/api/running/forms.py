"""The graphs of an optimised model by form of call: the plan's own, and others as they come."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from threading import RLock
from typing import Any

import torch
from torch import nn

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.common.errors import (
    CalicacheError,
    CaptureError,
    RunError,
    SiteError,
    reason_of,
)
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.reads import fits_fixed
from calicache.graph_passes.recording.signature import FlatCall
from calicache.graph_passes.rewriting.compile import (
    Assignment,
    Compiled,
    assign_targets,
    compile_graphs,
    compile_recipe,
)
from calicache.graph_passes.sites.analysis import Analysis, analyse, analyse_whole


class FormTable:
    """Graphs for the plan's own form of call, and for others as they are asked for.

    They share weights and factors: these belong to layers, not to sizes.

    Args:
        original: the model as it was.
        plan: what it runs under.
        own: the graphs for the plan's own form; made when they are asked for where None.
        limit: how many other forms are kept, those that were asked for last.
    """

    def __init__(self, original: nn.Module, plan: Plan, own: Compiled | None, limit: int) -> None:
        self.original, self.plan, self.limit = original, plan, limit
        self._own, self._lazy = own, own is None
        self._others: list[Compiled] = []  # the newest last
        self._lock = RLock()

    @property
    def own(self) -> Compiled:
        """The graphs for the plan's own form.

        Raises:
            CalicacheError: whatever stage refuses names itself.
        """
        with self._lock:
            if self._own is None:
                self._own = compile_plan(self.original, self.plan)
            return self._own

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
                self._check_precision(call)
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

    def _check_precision(self, call: FlatCall) -> None:
        """Refuse tensors of another precision that the model itself does not take.

        Tracing does not see that weights are of another dtype.

        Raises:
            CaptureError: it does not; with its reason.
        """
        signature, own = call.signature(), self.plan.binding.signature.by_pattern()
        if all(own[name].dtype == spec.dtype for name, spec in signature.by_pattern().items()):
            return
        try:
            with torch.no_grad():
                self.original(**signature.unflatten([*call.tensors.values()]))
        except Exception as error:
            raise CaptureError(
                type(self.original).__name__,
                expected="tensors of a precision that the model takes",
                got=reason_of(error),
                fix="Cast the model too: fast.to(dtype).",
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

    def renew(self, plan: Plan) -> None:
        """Make all graphs anew when they are asked for, of the weights as they are now."""
        with self._lock:
            self.plan, self._own = plan, None
            self._others.clear()

    def forget(self) -> None:
        """Drop what can be made again: the weights have gone elsewhere."""
        self._others.clear()
        if self._lazy:
            self._own = None

    def _use(self, compiled: Compiled) -> Compiled:
        if compiled is not self.own:
            others = [other for other in self._others if other is not compiled]
            self._others = [*others, compiled][-self.limit :]
        return compiled

    def _compile(self, analysis: Analysis) -> Compiled:
        assignment = _same_targets(self.own, analysis)
        known = [t.name for t in assignment.targets if t.name in self.own.factors]
        like = next(analysis.captured.module.parameters(), None)  # a model may have none
        factors = {name: self.own.factors[name].to(like) for name in known if like is not None}
        return compile_graphs(analysis, self.plan.recipe, assignment, factors)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_others": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=RLock())


class WholeTable:
    """A model that is run whole, by form of call: for plans that touch nothing inside of it.

    Args:
        original: the model.
        plan: what it runs under.
        limit: how many forms are kept, those that were asked for last.
    """

    def __init__(self, original: nn.Module, plan: Plan, limit: int) -> None:
        self.original, self.plan, self.limit = original, plan, limit
        self._forms: list[Compiled] = []

    def for_call(self, call: FlatCall) -> Compiled:
        """The one node and what mixes its outputs, for calls like this one; runs it once if new.

        Raises:
            RunError: it differs in more than sizes and constants.
        """
        signature = call.signature()
        for compiled in self._forms:
            if compiled.analysis.binding.signature == signature:
                return compiled
        binding = self.plan.binding.with_signature(signature)
        analysis = analyse_whole(self.original, binding, call.tensors)
        compiled = compile_graphs(analysis, self.plan.recipe, Assignment(()), {})
        self._forms = [*self._forms, compiled][-self.limit :]
        return compiled

    def forget(self) -> None:
        """Drop all forms: the weights have gone elsewhere."""
        self._forms = []


def compile_plan(model: nn.Module, plan: Plan, meter: Meter | None = None) -> Compiled:
    """The graphs of a model for the plan's own form of call.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    recipe, workspace = plan.recipe, plan.workspace
    if meter:
        meter.stage("capture the model")
    analysis = workspace.analysis(model, plan.binding, recipe.include, recipe.exclude)
    if meter:
        meter.stage("make factors")
    return compile_recipe(analysis, recipe, plan.statistics, workspace.decompositions, meter)


def _same_targets(own: Compiled, analysis: Analysis) -> Assignment:
    """The plan's calibration targets as far as they are there in another form of call.

    The others are computed in full, such as layers of a text that all images share.

    Raises:
        SiteError: none of them is there.
    """
    names = {site.name for site in analysis.sites.linears}
    names |= {branch.name for branch in analysis.sites.branches}
    rules = [r for r in own.recipe.rules if any(fnmatchcase(name, r.pattern) for name in names)]
    recipe = replace(own.recipe, ranks={}, rules=tuple(rules))
    assignment = assign_targets(analysis, recipe)
    by_name = {target.name: target for target in own.targets}
    targets = tuple(
        replace(target, rank=by_name[target.name].rank)
        for target in assignment.targets
        if target.name in by_name
    )
    if own.targets and not targets:
        raise SiteError(
            "form of call",
            expected=f"some of the {len(own.targets)} calibration targets of the plan",
            got="none of them",
            fix="Record and plan with this form of call.",
        )
    return Assignment(targets, assignment.rejections)
