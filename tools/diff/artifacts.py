"""What differs between two artifacts."""

from __future__ import annotations

from collections.abc import Iterator

from calicache.export.artifact.manifest import Manifest
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
from calicache.tools.inspect.artifact_facts import ArtifactFacts, artifact_facts
from calicache.tools.terminal.subject import ArtifactSubject

_BELONGING = ("calicache", "format", "weights_hash")
_SETTINGS = ("rank", "order", "weighting", "correction", "calls_per_step", "fixed")
# Shown in other sections, as costs or as targets.
_ELSEWHERE = (
    *("files", "schedule", "cache_bytes", "plain_macs", "modes", "targets", "front"),
    "output_weights",
)


def diff_artifacts(a: ArtifactSubject, b: ArtifactSubject) -> Difference:
    """What differs between two artifacts."""
    first, second = artifact_facts(a), artifact_facts(b)
    return Difference(
        kind="artifact",
        a=str(a.path),
        b=str(b.path),
        belonging=tuple(_belonging(a.manifest, b.manifest)),
        schedule=diff_schedules(first.schedule, second.schedule),
        settings=(
            *_fields(a.manifest, b.manifest, _SETTINGS),
            *changed_weights(a.manifest.output_weights, b.manifest.output_weights),
            *changed_fronts(first.front, second.front),
        ),
        targets=diff_states(_states(first), _states(second)),
        layers=diff_layers(first.layers, second.layers),
        costs=_costs(first, second),
        structure=tuple(
            changed_fields(a.manifest, b.manifest, (*_BELONGING, *_SETTINGS, *_ELSEWHERE))
        ),
    )


def _belonging(a: Manifest, b: Manifest) -> Iterator[Change]:
    yield from _fields(a, b, _BELONGING)
    files = [{file.name: file.sha256 for file in manifest.files} for manifest in (a, b)]
    for name in sorted({*files[0], *files[1]}):
        yield from changed(name, files[0].get(name), files[1].get(name))


def _fields(a: Manifest, b: Manifest, names: tuple[str, ...]) -> Iterator[Change]:
    for name in names:
        yield from changed(name, getattr(a, name), getattr(b, name))


def _states(facts: ArtifactFacts) -> dict[str, TargetState]:
    return {target.name: TargetState(target.rank, target.energy) for target in facts.targets}


def _costs(a: ArtifactFacts, b: ArtifactFacts) -> tuple[NumberChange, ...]:
    return (
        *diff_numbers("share", _shares(a), _shares(b)),
        *diff_numbers("MACs", *({"plain model": float(f.plain_macs)} for f in (a, b))),
        *diff_numbers("bytes", *({"caches": float(f.cache_bytes)} for f in (a, b))),
        *diff_numbers("bytes", _reads(a), _reads(b)),
    )


def _shares(facts: ArtifactFacts) -> dict[str, float]:
    modes = {f"a step of {entry.mode.name}": entry.share for entry in facts.modes}
    return {"whole run": facts.run_share, **modes}


def _reads(facts: ArtifactFacts) -> dict[str, float]:
    return {f"read by {entry.mode.name}": float(entry.read_bytes) for entry in facts.modes}
