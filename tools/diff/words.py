"""Values of settings and manifests in a few words, and the changes between two of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from itertools import chain
from typing import Any

from calicache.graph_passes.common.rejection import Rejection
from calicache.graph_passes.recording.signature import CallSignature, TensorSpec
from calicache.graph_passes.recording.timestep import Timestep
from calicache.graph_passes.settings.choices import SiteRule
from calicache.graph_passes.settings.front import Front
from calicache.graph_passes.settings.schedule import Table
from calicache.tools.diff.difference import Change


def changed_fields(a: Any, b: Any, left_out: Collection[str]) -> Iterator[Change]:
    """Fields of two values of one dataclass that differ, but for some."""
    for field in fields(a):
        if field.name not in left_out:
            yield from changed(field.name, getattr(a, field.name), getattr(b, field.name))


def changed(name: str, a: Any, b: Any) -> Iterator[Change]:
    """The change between two values, if there is one; of lists and mappings, what differs."""
    if a == b:
        return
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        a, b = _without_shared(a, b), _without_shared(b, a)
    elif _is_list(a) and _is_list(b):
        own = [entry for entry in a if entry not in b]
        others = [entry for entry in b if entry not in a]
        if own or others:  # else the order alone differs
            a, b = own, others
    yield Change(name.replace("_", " "), _entries(a), _entries(b))


def _entries(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return tuple(f"{key}: {in_words(entry)}" for key, entry in value.items())
    return tuple(map(in_words, value)) if _is_list(value) else (in_words(value),)


def in_words(value: Any) -> str:
    """A value of a setting or of a manifest, short."""
    if value is None:
        return "none"
    if isinstance(value, Enum):
        return value.name if isinstance(value, int) else str(value.value)
    if isinstance(value, SiteRule):
        parts = (value.pattern, value.mode, value.granularity, value.branch)
        rank = "" if value.rank is None else f" rank {value.rank}"
        return " ".join(part for part in parts if part) + rank
    if isinstance(value, TensorSpec):
        return f"{value.name} {value}"
    if isinstance(value, Rejection):
        return f"{value.name}: {value.reason}"
    if isinstance(value, CallSignature):
        constants = (f"{spec.name}={spec.value!r}" for spec in value.constants)
        return ", ".join([*map(in_words, value.tensors), *constants])
    if isinstance(value, Timestep):
        way = "falls" if value.descends else "rises"
        return f"{value.name} {way}, {value.calls} calls a step"
    return ", ".join(map(in_words, value)) if _is_list(value) else str(value)


def _without_shared(own: Mapping[Any, Any], other: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in own.items() if key not in other or other[key] != value}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def changed_fronts(a: Front | None, b: Front | None) -> Iterator[Change]:
    """The searches that plans are from, if they differ."""
    if a == b:
        return
    first, second = _front(a), _front(b)
    if first == second:
        second = (*second, "with other numbers")
    yield Change("front", first, second)


def _front(front: Front | None) -> tuple[str, ...]:
    if front is None:
        return ()
    return (front.request, f"{len(front.points)} points, number {front.choice} taken")


def changed_weights(a: Table | None, b: Table | None) -> Iterator[Change]:
    """How far the weights of two plans' outputs are apart, if they differ."""
    if a == b:
        return
    if a is None or b is None:
        words = [() if table is None else ("fitted",) for table in (a, b)]
        yield Change("output weights", *words)
    elif [len(row) for row in a] == [len(row) for row in b]:
        pairs = zip(chain.from_iterable(a), chain.from_iterable(b), strict=True)
        most = max(abs(x - y) for x, y in pairs)
        yield Change("output weights", ("fitted",), (f"fitted, up to {most:.3g} from A",))
    else:
        yield Change("output weights", ("fitted",), ("fitted, for other steps or order",))
