"""The recipes of a plan, one or several: how they are told apart, described and saved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Self, SupportsFloat

from calicache.graph_passes.api.plan_file import PlanContent, read_plans, write_plans
from calicache.graph_passes.api.plan_grids import check_count, check_grids, grid_names, place_of
from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.describe.html import plan_html
from calicache.graph_passes.describe.text import plan_text
from calicache.graph_passes.rewriting.workspace import Workspace
from calicache.graph_passes.search.ground import check_latency
from calicache.graph_passes.settings.choices import StepMode
from calicache.graph_passes.settings.latency import LatencyTable


@dataclass(frozen=True, slots=True, repr=False)
class PlanRecipes(PlanContent):
    """The content of a plan, once for each of its recipes.

    Attributes:
        workspace: what was made of the model on the way, in memory alone; no part of the value.
        others: plans of the other recipes. All that is beside them is of the first one.
    """

    workspace: Workspace = field(default_factory=Workspace, compare=False, repr=False)
    others: tuple[Self, ...] = ()

    def __post_init__(self) -> None:
        if self.others:
            check_grids([plan.binding for plan in self.plans])

    @property
    def plans(self) -> tuple[Self, ...]:
        """A plan for every recipe."""
        return (replace(self, others=()), *self.others) if self.others else (self,)

    @property
    def names(self) -> tuple[str, ...]:
        """Of every recipe: its number of steps, such as `20`, or `20-2` for a second one."""
        return grid_names([plan.binding.grid for plan in self.plans])

    @property
    def schedule(self) -> tuple[StepMode, ...]:
        """Mode of every step.

        Raises:
            PlanError: the plan has several recipes.
        """
        return self.one("schedule").recipe.schedule

    @property
    def interval(self) -> int:
        """Longest distance from one REFRESH to the next (or to the end).

        Raises:
            PlanError: the plan has several recipes.
        """
        return self.one("interval").recipe.interval

    @classmethod
    def join(cls, *plans: Self) -> Self:
        """One plan with the recipes of several, for one model and other grids of timesteps.

        A run whose first timesteps are those of several has the first of them until they part.

        Raises:
            PlanError: they are for other models, or two for the same timesteps.
            RunError: the calls of one differ from another's in more than sizes and constants.
        """
        check_count(len(plans))
        parts = [
            part
            for n, p in enumerate(plans)
            for part in of_kind(f"plan {n}", p, cls, PlanError).plans
        ]
        return replace(parts[0], others=tuple(parts[1:])) if parts[1:] else parts[0]

    def for_grid(self, grid: int | Iterable[SupportsFloat]) -> Self:
        """The plan of one recipe.

        Args:
            grid: its number of steps, or its timesteps: all, or the last ones.

        Raises:
            PlanError: there is no such recipe, or several.
        """
        return self.plans[self.number_of(grid)]

    def number_of(self, grid: int | Iterable[SupportsFloat]) -> int:
        """Number of a recipe among `plans`; see `for_grid`.

        Raises:
            PlanError: there is no such recipe, or several.
        """
        return place_of([plan.binding.grid for plan in self.plans], grid)

    def one(self, where: str) -> Self:
        """This plan, for what takes one recipe.

        Args:
            where: what takes it.

        Raises:
            PlanError: the plan has several recipes.
        """
        if not self.others:
            return self
        raise PlanError(
            where,
            expected="a plan with one recipe",
            got=f"one for {', '.join(self.names)} steps",
            fix=f"Take one of them: .for_grid({self.names[0]}), or its folder, {self.names[0]}, in "
            "the saved plan's.",
        )

    @classmethod
    def of(cls, content: PlanContent, workspace: Workspace) -> Self:
        """The plan of one recipe with its files' content, and what was made on the way."""
        parts = {field.name: getattr(content, field.name) for field in fields(PlanContent)}
        return cls(**parts, workspace=workspace)

    def describe(self, latency: LatencyTable | None = None) -> str:
        """The plan in a few lines.

        Args:
            latency: measured seconds of this checkpoint: each mode is then told what its steps
                take, and whether that is more than a plain step takes here.

        Raises:
            PlanError: the seconds are of another checkpoint.
        """
        check_latency(latency, self.binding)
        texts = [plan_text(plan.recipe, plan.front, plan.in_sample, latency) for plan in self.plans]
        if len(texts) == 1:
            return texts[0]
        recipes = ("  " + text.replace("\n", "\n    ") for text in texts)
        return "\n".join((f"{len(texts)} recipes, chosen by the timesteps", *recipes))

    def __repr__(self) -> str:
        lines = self.describe().splitlines()
        return "\n  ".join((f"Plan for weights {self.binding.weights_hash[:12]}", *lines))

    def _repr_html_(self) -> str:
        """What a notebook shows of the plan."""
        return "".join(
            plan_html(plan.binding, plan.recipe, len(plan.statistics), plan.front, plan.in_sample)
            for plan in self.plans
        )

    def save(self, path: Path | str) -> None:
        """Write the plan into a new or replaced folder, as plain data.

        Of several recipes each has a folder in there, such as `20`, that is a plan by itself.
        """
        write_plans(dict(zip(self.names, self.plans, strict=True)), path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises:
            PlanError: a file is missing, damaged, of another version, or not a plan.
        """
        return cls.join(*(cls.of(content, Workspace()) for content in read_plans(path)))
