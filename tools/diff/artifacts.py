"""What differs between two artifacts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

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
from calicache.tools.diff.words import changed, changed_fields, changed_fronts
from calicache.tools.inspect.artifact_facts import ArtifactFacts, artifact_facts
from calicache.tools.inspect.onnx_facts import operator_counts
from calicache.tools.terminal.subject import ONNX_SUFFIX, ArtifactSubject, read_onnx

_BELONGING = ("calicache", "format", "weights_hash")
_SETTINGS = ("rank", "order", "weighting", "correction", "calls_per_step", "fixed")
# Shown in other sections, as costs or as targets.
_ELSEWHERE = ("files", "schedule", "cache_bytes", "plain_macs", "modes", "targets", "front")


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
            *changed_fronts(first.front, second.front),
        ),
        targets=diff_states(_states(first), _states(second)),
        layers=diff_layers(first.layers, second.layers),
        costs=_costs(first, second),
        structure=tuple(
            changed_fields(a.manifest, b.manifest, (*_BELONGING, *_SETTINGS, *_ELSEWHERE))
        ),
        operators=_operators(a, b),
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


def _operators(a: ArtifactSubject, b: ArtifactSubject) -> tuple[NumberChange, ...]:
    """Nodes by operator: of every model, or of all together where the models are others."""
    digests = [_models(target) for target in (a, b)]
    if digests[0] == digests[1]:
        return ()
    counts = [
        {name: Counter(operator_counts(read_onnx(target.path / name))) for name in models}
        for target, models in zip((a, b), digests, strict=True)
    ]
    if counts[0].keys() != counts[1].keys():
        totals = (sum(by_model.values(), Counter[str]()) for by_model in counts)
        return diff_numbers("nodes", *map(_floats, totals))
    several = len(counts[0]) > 1
    changes: list[NumberChange] = []
    for name in counts[0]:
        found = diff_numbers("nodes", *(_floats(by_model[name]) for by_model in counts))
        changes += [replace(c, name=f"{name}: {c.name}") if several else c for c in found]
    return tuple(changes)


def _floats(counts: Mapping[str, int]) -> dict[str, float]:
    return {name: float(count) for name, count in counts.items()}


def _models(target: ArtifactSubject) -> dict[str, str]:
    """SHA-256 of every ONNX file of an artifact."""
    files = target.manifest.files
    return {file.name: file.sha256 for file in files if file.name.endswith(ONNX_SUFFIX)}
