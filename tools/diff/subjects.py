"""What differs between two plans, or between two artifacts, from the facts of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calicache.export.artifact.manifest import FileRecord, Manifest
from calicache.graph_passes.settings.front import Front
from calicache.tools.diff.difference import (
    Change,
    Difference,
    NumberChange,
    TargetState,
    diff_layers,
    diff_numbers,
    diff_schedules,
    diff_states,
)
from calicache.tools.diff.words import changed, changed_fields, changed_fronts, changed_weights
from calicache.tools.inspect.artifact import ArtifactFacts
from calicache.tools.inspect.plan import PlanFacts

_BELONGING = ("calicache", "format", "weights_hash")
_SETTINGS = ("rank", "branch", "order", "weighting", "correction", "calls_per_step", "fixed")
# Shown in other sections than the settings or the structure, or in other words.
_ELSEWHERE: tuple[str, ...] = (
    "schedule",
    "weights_hash",
    "ranks",
    "output_weights",
    "files",
    "cache_bytes",
    "plain_macs",
    "modes",
    "targets",
    "front",
)


def diff_plans(a: PlanFacts, b: PlanFacts) -> Difference:
    """What differs between two plans."""
    return Difference(
        kind="plan",
        a=a.path,
        b=b.path,
        belonging=(
            *changed("weights", a.binding.weights_hash, b.binding.weights_hash),
            *_changed_files(a.files[1:], b.files[1:]),  # the settings' own file says it all again
        ),
        schedule=diff_schedules(a.schedule, b.schedule),
        settings=(
            *changed_fields(a.binding, b.binding, _ELSEWHERE),
            *changed_fields(a.recipe, b.recipe, _ELSEWHERE),
            *changed_weights(a.recipe.output_weights, b.recipe.output_weights),
            *changed("sampler", a.sampler, b.sampler),
            *changed_fronts(a.front, b.front),
        ),
        targets=diff_states(
            *({t.name: TargetState(t.rank, None) for t in facts.targets} for facts in (a, b))
        ),
        layers=(),
        costs=_searched_costs(a.front, b.front),
        structure=(),
    )


def _searched_costs(a: Front | None, b: Front | None) -> tuple[NumberChange, ...]:
    """What the searches counted, where both plans are from one."""
    if a is None or b is None:
        return ()
    points = [front.points[front.choice] for front in (a, b)]
    costs = ({f"cost in {f.unit}": p.cost} for f, p in zip((a, b), points, strict=True))
    errors = ({"error of the point": point.error.mean} for point in points)
    return (*diff_numbers("share", *costs), *diff_numbers("error", *errors))


def diff_artifacts(a: ArtifactFacts, b: ArtifactFacts) -> Difference:
    """What differs between two artifacts."""
    first, second = a.manifest, b.manifest
    return Difference(
        kind="artifact",
        a=a.path,
        b=b.path,
        belonging=(
            *_changed_names(first, second, _BELONGING),
            *_changed_files(first.files, second.files),
        ),
        schedule=diff_schedules(a.schedule, b.schedule),
        settings=(
            *_changed_names(first, second, _SETTINGS),
            *changed_weights(first.output_weights, second.output_weights),
            *changed_fronts(first.front, second.front),
        ),
        targets=diff_states(
            *(
                {t.name: TargetState(t.rank, t.energy, t.branch) for t in m.targets}
                for m in (first, second)
            )
        ),
        layers=diff_layers(a.layers, b.layers),
        costs=(
            *diff_numbers("share", _shares(a), _shares(b)),
            *diff_numbers("MACs", *({"plain model": float(m.plain_macs)} for m in (first, second))),
            *diff_numbers("bytes", _bytes(a), _bytes(b)),
        ),
        structure=tuple(changed_fields(first, second, (*_BELONGING, *_SETTINGS, *_ELSEWHERE))),
    )


def _changed_files(a: Sequence[FileRecord], b: Sequence[FileRecord]) -> Iterator[Change]:
    first, second = ({file.name: file.sha256 for file in files} for files in (a, b))
    for name in sorted({*first, *second}):
        yield from changed(name, first.get(name), second.get(name))


def _changed_names(a: Manifest, b: Manifest, names: tuple[str, ...]) -> Iterator[Change]:
    for name in names:
        yield from changed(name, getattr(a, name), getattr(b, name))


def _shares(facts: ArtifactFacts) -> dict[str, float]:
    modes = {f"a step of {entry.mode.name}": entry.share for entry in facts.modes}
    return {"whole run": facts.run_share, **modes}


def _bytes(facts: ArtifactFacts) -> dict[str, float]:
    reads = {f"read by {entry.mode.name}": float(entry.read_bytes) for entry in facts.modes}
    return {"caches": float(facts.cache_bytes), **reads}
