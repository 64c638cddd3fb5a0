"""What has been made of a model in this process: a plan hands it on, so that nothing is made twice.

It holds analyses by model, as long as the model lives, what was seen along recordings, as long as
these live, and decompositions as far as they are small. It is no part of a plan's value: copies and
files begin with an empty one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.disk.hashing import tensor_bytes
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.offloading import lacks_weights
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.common.ranks import ALONE, Ranks
from calicache.graph_passes.factors.factors import Decompositions
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.sites.analysis import Analysis, analyse

Seen = TypeVar("Seen")
Place = frozenset[tuple[torch.device, torch.dtype]]


class Workspace:
    """Analyses and decompositions of one checkpoint."""

    def __init__(self) -> None:
        self._analyses: WeakKeyDictionary[nn.Module, list[tuple[Place, Analysis]]]
        self._analyses = WeakKeyDictionary()
        self.decompositions = Decompositions()
        self._seen: WeakKeyDictionary[Recording, dict[Hashable, Any]] = WeakKeyDictionary()

    def analysis(
        self,
        model: nn.Module,
        binding: Binding,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> Analysis:
        """The analysis of a model for one form of call, made at the first request.

        Args:
            model: of the checkpoint that the binding names.
            binding: the form of the calls.
            include: shell patterns; a site needs to match one.
            exclude: shell patterns; a site may match none.

        Raises:
            CalicacheError: see `analyse`.
        """
        wish, place = (binding, tuple(include), tuple(exclude)), _place(model)
        analyses = self._analyses.setdefault(model, [])
        for known_place, analysis in analyses:
            known = (analysis.binding, analysis.include, analysis.exclude)
            if known == wish and known_place == place:
                return analysis
        analyses.append((place, analyse(model, *wish)))
        return analyses[-1][1]

    def seen(
        self, model: nn.Module, recording: Recording, name: Hashable, look: Callable[[], Seen]
    ) -> Seen:
        """What is seen of a model along a recording, looked for at the first request.

        Args:
            model: of the checkpoint that the workspace is for.
            recording: of its calls.
            name: of what is looked for, and all else that decides it.
            look: runs the model.
        """
        seen = self._seen.setdefault(recording, {})
        key = (name, id(model), _place(model))
        if key not in seen:
            seen[key] = look()
        known: Seen = seen[key]
        return known

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()


@dataclass(frozen=True, slots=True)
class PlanningTask:
    """What is planned for.

    Attributes:
        model: in eval mode.
        recording: of its calls.
        binding: of both.
        workspace: for what is made of the model on the way.
        meter: counts calls of the model in this process.
        ranks: the processes that share the recorded runs.
        reference: the same runs in more steps, which weights aim at; None for the recorded ones.
    """

    model: nn.Module
    recording: Recording
    binding: Binding
    workspace: Workspace
    meter: Meter
    ranks: Ranks = ALONE
    reference: Recording | None = None

    def __post_init__(self) -> None:
        if self.reference is not None:
            of_kind("reference", self.reference, Recording, PlanError)

    def key(self, settings: object) -> str:
        """What the results depend on, as text: checkpoint, recording and what is asked for."""
        digest = hashlib.sha256()
        recordings = [self.recording, *([self.reference] if self.reference else [])]
        for recording in recordings:
            results = {str(count): end for count, end in recording.results.items()}
            for tensors in (*recording.calls, results):
                for name, value in tensors.items():
                    digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
                    digest.update(tensor_bytes(value))
        return f"{self.binding.weights_hash} {digest.hexdigest()} {settings}"

    def check_alike(self, settings: object) -> None:
        """Refuse processes that do not plan for the same.

        Args:
            settings: what is asked for.

        Raises:
            RankError: one has another model, recording or wish.
        """
        if self.ranks.size > 1:
            own = hashlib.sha256(self.key(settings).encode()).hexdigest()[:12]
            self.ranks.check_alike(
                "model, recording and settings",
                own,
                "Give every process the same: recording.gather() joins what each has recorded.",
            )

    def check_weights(self, fix: str) -> None:
        """Refuse a model on the meta device, where the recorded calls have to be run.

        Args:
            fix: what to do about it.

        Raises:
            PlanError: there are no weights.
        """
        if lacks_weights(self.model):
            raise PlanError(
                "model",
                expected="weights, to run the recorded calls with",
                got="a model on the meta device",
                fix=fix,
            )


def _place(model: nn.Module) -> Place:
    """Where the weights are, and in which dtypes: a graph holds constants that do not move."""
    return frozenset((value.device, value.dtype) for value in model.parameters())
