"""The cache folder of `speed_up`: plans by what they were made for, and unfinished work.

Nothing in it is believed: plans, tables and recordings are checked by their own readers, and what
they refuse is made again. A process that finds the work of another one in progress keeps none.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import TypeAdapter

from calicache.graph_passes.api.plan import Plan
from calicache.graph_passes.api.speed.summary import Promise
from calicache.graph_passes.common.arguments import path_of
from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.disk.files import PLAIN_FILE, atomic_path
from calicache.graph_passes.common.disk.replacing import hold
from calicache.graph_passes.common.errors import CalicacheError, CalicacheWarning, PlanError

SUMMARY_FILE = "summary.json"

_SUMMARY = DocumentKind(
    "summary",
    1,
    TypeAdapter(Promise),
    PlanError,
    "a summary written by speed_up",
    "Delete it.",
)


class Saved(Protocol):
    """What can be written to a file."""

    def save(self, path: Path) -> None:
        """Write it."""


Value = TypeVar("Value", bound=Saved)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one call of `speed_up`: plans by name, and what was promised."""

    promise: Promise
    plans: Mapping[str, Plan]


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of plans; without one nothing is kept."""

    folder: Path | None

    @staticmethod
    def of(path: Path | str | None) -> Store:
        """A store in a folder, which is made when something is kept.

        Raises:
            PlanError: it is no path.
        """
        return Store(None if path is None else path_of(path, PlanError))

    def place(self, key: str) -> Path | None:
        """Where the plans of a key are."""
        return None if self.folder is None else self.folder / key

    def load(self, key: str) -> Kept | None:
        """What is kept under a key; None where there is nothing, or nothing that can be read."""
        place = self.place(key)
        if place is None or not os.path.lexists(place):
            return None
        try:
            promise = _SUMMARY.read(place / SUMMARY_FILE)
            names = [part.name for part in promise.parts if part.steps]
            return Kept(promise, {name: Plan.load(place / _plain(name)) for name in names})
        except CalicacheError as error:
            self.drop(key, error)
            return None

    def save(self, key: str, kept: Kept) -> None:
        """Keep something, in the place of what was there; a full disk is no reason to stop."""
        place = self.place(key)
        if place is None:
            return
        try:
            for name, plan in kept.plans.items():
                plan.save(place / name)
            with atomic_path(place / SUMMARY_FILE, PLAIN_FILE) as temporary:
                temporary.write_text(_SUMMARY.dumps(kept.promise))
        except CalicacheError as error:
            _warn(f"The plans could not be kept: {error}")

    def drop(self, key: str, reason: CalicacheError) -> None:
        """Remove what cannot be used, and say so."""
        _warn(f"What was kept of an earlier search cannot be used; it is made again. {reason}")
        place = self.place(key)
        if place is not None:
            _remove(place)

    @contextmanager
    def working(self, key: str) -> Iterator[Work]:
        """A folder for unfinished work, which is removed where the work is done."""
        place = self.place(f"{key}.work")
        held: int | None = None
        if place is not None:
            with suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                held = hold(place)
        if place is None or held is None:
            yield Work(None)
            return
        try:
            yield Work(place)
            _remove(place)
        finally:
            os.close(held)


@dataclass(frozen=True, slots=True)
class Work:
    """What an interrupted call has done already; without a folder nothing is kept."""

    folder: Path | None

    def place(self, name: str) -> Path | None:
        """Where something of that name is kept."""
        return None if self.folder is None else self.folder / name

    def load(self, name: str, load: Callable[[Path], Value]) -> Value | None:
        """What is kept under a name; None where there is nothing, or nothing that can be read."""
        place = self.place(name)
        if place is None or not os.path.lexists(place):
            return None
        try:
            return load(place)
        except CalicacheError as error:
            self.drop(name, error)
            return None

    def save(self, name: str, value: Saved) -> None:
        """Keep something; a full disk is no reason to stop."""
        place = self.place(name)
        if place is not None:
            try:
                value.save(place)
            except CalicacheError as error:
                _warn(f"Unfinished work could not be kept: {error}")

    def owns(self, error: CalicacheError) -> bool:
        """Whether an error is about a file of this work."""
        return self.folder is not None and error.where.startswith(str(self.folder))

    def drop(self, name: str, reason: CalicacheError) -> None:
        """Remove what cannot be used, and say so."""
        _warn(f"Unfinished work cannot be used; it is done again. {reason}")
        place = self.place(name)
        if place is not None:
            _remove(place)


def _plain(name: str) -> str:
    """The name of a part as a name in a folder: a file may say anything.

    Raises:
        PlanError: it leads elsewhere.
    """
    if not name.isidentifier():
        raise PlanError("part", expected="the name of a model", got=repr(name), fix="Delete it.")
    return name


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _warn(text: str) -> None:
    warnings.warn(text, CalicacheWarning, stacklevel=2)
