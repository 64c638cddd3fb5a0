"""Calls of other sizes than the recorded one: exact at full rank, or refused in words."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes import CalicacheError, OptimizedModel, Plan, optimize, record
from zoo.drive import STEPS, denoise, make_model, run_sampler
from zoo.entry import ZooEntry
from zoo.finding import (
    FULL_RANK_BOUND,
    NOTHING,
    REFUSED,
    Check,
    check_error,
    full_rank,
    one_line,
    worst_error,
)

RECORDED = 2  # samples
TABLES = "zoo.tables"
LARGER: Mapping[str, Mapping[str, int]] = {"prompt": {"TEXT": 9}, "height": {"HEIGHT": 8}}


def try_sizes(entry: ZooEntry) -> dict[str, Check]:
    """How the optimised model does at other sizes than the recorded one.

    Args:
        entry: of the zoo.

    Returns:
        By size: 1 and 3 samples, a longer prompt, twice the height. A reason that begins with
        `refused` is calicache's own; with `n/a` there was nothing to compare.
    """
    try:
        model = make_model(entry)
        fast = _at_full_rank(model, entry)
    except Exception as error:
        names = ("batch", *LARGER)
        return dict.fromkeys(names, Check(reason=f"{NOTHING}: {one_line(error)}"))
    # All at once first: a capture takes seconds, and what is exact together is so apart.
    together = entry_with(entry.name, {k: v for sizes in LARGER.values() for k, v in sizes.items()})
    known = _check(fast, model, entry, [(together, 3)])
    others = [(entry, 1)] if known.passed else [(entry, 1), (entry, 3)]
    checks = {"batch": _check(fast, model, entry, others)}
    for name, sizes in LARGER.items():
        other = entry_with(entry.name, sizes)
        apart = not known.passed or not _differs(other, entry)
        checks[name] = _check(fast, model, entry, [(other, RECORDED)]) if apart else known
    return checks


def entry_with(name: str, sizes: Mapping[str, int]) -> ZooEntry:
    """An entry of the tables, read again with other sizes; its configuration may differ too.

    Args:
        name: of the entry.
        sizes: values of names in `zoo.tables.sizes`.
    """
    with _tables_apart():
        module = importlib.import_module(f"{TABLES}.sizes")
        for constant, value in sizes.items():
            assert hasattr(module, constant)
            setattr(module, constant, value)
        names = ("image", "video", "wan", "audio")
        tables = [importlib.import_module(f"{TABLES}.{table}") for table in names]
        entries: Iterator[Any] = (entry for table in tables for entry in table.ENTRIES)
        entry = next(entry for entry in entries if entry.name == name)
    assert isinstance(entry, ZooEntry)
    return entry


@contextmanager
def _tables_apart() -> Iterator[None]:
    """Import the tables anew inside, and leave those that were there as they are."""
    own = {name: sys.modules.pop(name) for name in _table_modules()}
    try:
        yield
    finally:
        for name in _table_modules():
            del sys.modules[name]
        sys.modules.update(own)
        for name, module in own.items():
            setattr(sys.modules[TABLES], name.rpartition(".")[2], module)


def _table_modules() -> list[str]:
    return [name for name in sys.modules if name.startswith(f"{TABLES}.")]


def _at_full_rank(model: nn.Module, entry: ZooEntry) -> OptimizedModel:
    with record(model) as recording:
        run_sampler(model, entry, RECORDED, linear=True)
    plan = Plan.from_trajectory(
        model, recording, schedule=3, rank=0, order=0, weighting="none", correct=False
    )
    sites = optimize(model, plan).compiled.analysis.sites
    return optimize(model, full_rank(plan, sites))


def _check(
    fast: OptimizedModel, model: nn.Module, entry: ZooEntry, calls: Sequence[tuple[ZooEntry, int]]
) -> Check:
    """The worst of several calls, or the first that cannot be compared."""
    errors = []
    for other, batch in calls:
        if batch == RECORDED and not _differs(other, entry):
            return Check(reason=f"{NOTHING}: no such size")
        try:
            expected = denoise(model, other, batch)
        except Exception as error:
            return Check(reason=f"{NOTHING}: the model itself: {one_line(error)}")
        fast.reset()
        try:
            got = denoise(fast, other, batch)
        except CalicacheError as error:
            return Check(reason=f"{REFUSED}: {one_line(error)}")
        except Exception as error:
            return Check(reason=one_line(error))
        if any(call.start or call.place != STEPS - 1 for call in fast.state.calls):
            return Check(reason="no run of the schedule: a call began anew")
        errors.append(worst_error(got, expected))
    return check_error(max(errors), FULL_RANK_BOUND, "the original")


def _differs(other: ZooEntry, entry: ZooEntry) -> bool:
    """Whether the inputs have other shapes."""
    return _shapes(other.inputs(RECORDED)) != _shapes(entry.inputs(RECORDED))


def _shapes(inputs: Mapping[str, Any]) -> list[Any]:
    leaves = pytree.tree_leaves(inputs)
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]
