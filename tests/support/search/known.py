"""A small model with text, and what a search knows of a model before it allocates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from support.analyses import analysis_of
from support.factors import factors_of
from torch import Tensor, nn
from torch.nn import functional as F

from calicache.graph_passes import (
    CalibrationTarget,
    CapturedGraph,
    Granularity,
    LatencyTable,
    Recording,
    Sites,
    StepMode,
    Weighting,
    uniform_schedule,
)
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.factors.statistics import SecondMoments
from calicache.graph_passes.graph.macs import graph_macs
from calicache.graph_passes.rewriting.compile import Assignment, Compiled, assign_targets
from calicache.graph_passes.rewriting.cost import model_cost
from calicache.graph_passes.rewriting.rewrite import rewrite
from calicache.graph_passes.rewriting.variants import VariantSet
from calicache.graph_passes.search.allocate import Allocation, BranchOption
from calicache.graph_passes.search.costs import TargetSurvey, branch_options
from calicache.graph_passes.search.families import PROBES
from calicache.graph_passes.search.sensitivity import BACK, sensitivities
from calicache.graph_passes.settings.recipe import Recipe
from calicache.graph_passes.settings.schedule import anchor_table
from calicache.graph_passes.sites.analysis import Analysis
from calicache.graph_passes.sites.targets import assign

ORDER = 2  # of the anchors


@dataclass(frozen=True)
class Known:
    """A model, what it is, and what is known of its calibration targets."""

    model: nn.Module
    recording: Recording
    analysis: Analysis
    schedule: tuple[StepMode, ...]
    survey: TargetSurvey

    @property
    def captured(self) -> CapturedGraph:
        """The plain graph."""
        return self.analysis.captured

    @property
    def sites(self) -> Sites:
        """Its layers and branches."""
        return self.analysis.sites

    @property
    def plain(self) -> int:
        """Multiply-accumulates of a plain step."""
        return graph_macs(self.captured.graph)

    def recipe(self, allocation: Allocation) -> Recipe:
        return Recipe(
            schedule=self.schedule,
            rank=8,
            order=ORDER,
            weighting=Weighting.COVARIANCE,
            rules=allocation.rules,
            ranks=allocation.ranks,
        )

    def options(self, latency: LatencyTable | None = None) -> dict[str, list[BranchOption]]:
        return branch_options(self.analysis, self.survey, latency)

    def planned(self, allocation: Allocation) -> tuple[CalibrationTarget, ...]:
        return assign_targets(self.analysis, self.recipe(allocation)).targets

    def compiled(
        self, targets: Sequence[CalibrationTarget], *modes: StepMode, fold: bool = False
    ) -> Compiled:
        """All of the targets folded, or none of them."""
        variant_set = self.variant_set(targets, *modes, fold=fold)
        cost = model_cost(self.analysis, targets, variant_set)
        recipe = self.recipe(Allocation((), {}, {}, 0.0, 0.0))
        return Compiled(self.analysis, recipe, Assignment(tuple(targets)), {}, variant_set, cost)

    def variant_set(
        self, targets: Sequence[CalibrationTarget], *modes: StepMode, fold: bool = False
    ) -> VariantSet:
        factors = factors_of(self.captured, targets, self.survey.moments)
        return rewrite(
            self.captured,
            self.sites,
            targets,
            factors,
            modes,
            folded=frozenset(factors if fold else ()),
            anchors=anchor_table(self.schedule, ORDER),
            run_values=self.analysis.run_values,
        )


def learn(model: nn.Module, recording: Recording) -> Known:
    """All that a search knows before it allocates."""
    analysis = analysis_of(model, recording)
    captured, sites = analysis.captured, analysis.sites
    schedule = uniform_schedule(recording.steps, 3)
    targets: dict[str, CalibrationTarget] = {}
    for granularity in Granularity:
        for t in assign(captured, sites, rank=8, granularity=granularity, joint=True)[0]:
            targets.setdefault(t.name, replace(t, rank=min(t.in_features, sum(t.out_features))))
    observed = observe(
        captured, [*targets.values()], recording, Weighting.COVARIANCE, schedule, ORDER
    )
    moments = {name: m for name, m in observed.items() if isinstance(m, SecondMoments)}
    factors = factors_of(captured, [*targets.values()], moments)
    spectra = {name: f.spectrum for name, f in factors.items() if f.spectrum is not None}
    layers = [t for t in targets.values() if t.granularity is Granularity.LINEAR]
    steps = sorted({max(BACK, round(share * (recording.steps - 1))) for share in PROBES})
    gains = sensitivities(captured, sites, layers, recording.runs[0], steps)
    survey = TargetSurvey(tuple(targets.values()), spectra, moments, gains)
    return Known(model, recording, analysis, schedule, survey)


class Heads(nn.Module):
    """Attention to a context, one head."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(w, width) for w in (width, context, context))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.proj(
            F.scaled_dot_product_attention(self.q(x), self.k(context), self.v(context))
        )


class Perceptron(nn.Module):
    """Two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class TextBlock(nn.Module):
    """Attention to itself and to a text, a perceptron that is modulated by the timestep."""

    def __init__(self, width: int, text: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = Heads(width, width), Heads(width, text)
        self.mlp, self.modulation = Perceptron(width), nn.Linear(4, width)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        n = F.layer_norm(x, x.shape[-1:])
        x = x + self.attn1(n, n)
        x = x + self.attn2(F.layer_norm(x, x.shape[-1:]), text)
        scale = self.modulation(condition)[:, None]
        return x + self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale))


class TextDiT(nn.Module):
    """Two blocks with a layer on the stream between them."""

    def __init__(self, width: int = 24, text: int = 20) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, width), nn.Linear(width, 6)
        self.blocks = nn.ModuleList(TextBlock(width, text) for _ in range(2))
        self.between = nn.Linear(width, width)

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        turns = torch.tensor([1.0, 0.1, 0.01, 0.001])
        condition = torch.cos(timestep[:, None] * turns)
        x = self.blocks[0](self.embed(latents), condition, text)
        return self.head(self.blocks[1](torch.tanh(self.between(x)), condition, text))
