"""What a long search has done already, in a folder: an interrupted one goes on from there.

Of several processes the first one writes and reads the results; large ones are read by all.

Every file names its search and its entry, and holds a sum of its content: a file of another
search, of another entry, or one that was changed is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter
from torch import Tensor

from calicache.graph_passes.common.arguments import path_of
from calicache.graph_passes.common.disk.bounds import Digest
from calicache.graph_passes.common.disk.documents import DocumentKind
from calicache.graph_passes.common.disk.files import Target, atomic_path
from calicache.graph_passes.common.disk.replacing import settle
from calicache.graph_passes.common.disk.tensor_files import digests, read_tensors, write_tensors
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.ranks import ALONE, Ranks

KEY_FILE = "search.json"

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class EntryKind(Generic[Value]):
    """One kind of results.

    Attributes:
        name: what the names of their files begin with.
        schema: what every file holds, as JSON.
    """

    name: str
    schema: TypeAdapter[Value]


@dataclass(frozen=True, slots=True)
class _Head:
    """What marks a folder as a journal.

    Attributes:
        search: digest of what the results depend on.
    """

    search: Digest


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a file of numbers holds.

    Attributes:
        search: the same digest as in the head.
        entry: name of the result.
        value: JSON that the schema of the entry's kind reads.
    """

    search: Digest
    entry: str
    value: str


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    """What a file of tensors holds beside them.

    Attributes:
        search, entry: as in `_Entry`.
        tensors: digests.
    """

    search: Digest
    entry: str
    tensors: dict[str, Digest]


_EXPECTED = "what an interrupted search of the same kind has kept"
_FIX = "Name another folder, or delete this one."


def _kind(name: str, schema: TypeAdapter[Value]) -> DocumentKind[Value]:
    return DocumentKind(name, 2, schema, PlanError, _EXPECTED, _FIX)


_HEAD = _kind("search", TypeAdapter(_Head))
_ENTRY = _kind("search result", TypeAdapter(_Entry))
_TENSORS = _kind("search tensors", TypeAdapter(_TensorEntry))
_NEW = Target("nothing", PlanError, lambda _: "something")


@dataclass(frozen=True, slots=True)
class Journal:
    """Results by kind and key; without a folder nothing is kept.

    Attributes:
        folder: made where it is missing.
        search: digest of what the results depend on.
        ranks: the processes that make one result together.
    """

    folder: Path | None
    search: str = ""
    ranks: Ranks = ALONE

    @staticmethod
    def open(path: Path | str | None, key: str, ranks: Ranks = ALONE) -> Journal:
        """Begin a journal, or go on with one of the same search.

        Args:
            path: a folder for the results; None keeps nothing.
            key: what the results depend on: model, recording, request.
            ranks: the processes that make one result together.

        Raises:
            PlanError: the folder holds something else, or another search.
        """
        if path is None:
            return Journal(None, ranks=ranks)
        folder = path_of(path, PlanError)
        own = _Head(hashlib.sha256(key.encode()).hexdigest())
        ranks.first(partial(_begin, folder, own))
        return Journal(folder, own.search, ranks)

    def result(self, kind: EntryKind[Value], key: str, compute: Callable[[], Value]) -> Value:
        """One result: read, or computed and kept.

        Args:
            kind: what it is.
            key: which of its kind; empty where there is one.
            compute: makes it.

        Raises:
            PlanError: its file is damaged, or holds something else.
        """
        name = "-".join(filter(None, (kind.name, key)))
        known = self.ranks.first(partial(self._known, kind, name))
        if known:
            return known[0]
        value = compute()
        return self.ranks.first(partial(self._keep, kind, name, value))

    def tensors(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of that name: read, or computed and kept.

        Raises:
            PlanError: their file is damaged.
        """
        if self.folder is None:
            return dict(compute())
        path = self.folder / f"{name}.safetensors"
        if self.ranks.first(path.exists):
            entry, tensors = read_tensors(_TENSORS, path)
            self._check(path, entry, name)
            return tensors
        value = {key: tensor.contiguous().cpu() for key, tensor in compute().items()}
        self.ranks.first(partial(self._keep_tensors, path, name, value))
        return value

    def _known(self, kind: EntryKind[Value], name: str) -> tuple[Value] | None:
        """A result that was kept."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        if path is None or not path.exists():
            return None
        entry = _ENTRY.read(path)
        self._check(path, entry, name)
        try:
            return (kind.schema.validate_json(entry.value, strict=True),)
        except ValueError as error:
            raise _ENTRY.refused(path, error) from error

    def _keep(self, kind: EntryKind[Value], name: str, value: Value) -> Value:
        if self.folder is not None:
            content = json.dumps(kind.schema.dump_python(value, mode="json"))  # inf stays inf
            entry = _Entry(self.search, name, content)
            _write(self.folder / f"{name}.json", _ENTRY.dumps(entry))
        return value

    def _keep_tensors(self, path: Path, name: str, value: Mapping[str, Tensor]) -> None:
        entry = _TensorEntry(self.search, name, digests(value))
        with atomic_path(path, _NEW) as temporary:
            write_tensors(_TENSORS, entry, value, temporary)

    def _check(self, path: Path, entry: _Entry | _TensorEntry, name: str) -> None:
        if entry.search != self.search:
            raise _ENTRY.refused(path, "a result of another search")
        if entry.entry != name:
            raise _ENTRY.refused(path, f"the result {entry.entry} under another name")


def _begin(folder: Path, own: _Head) -> None:
    """Mark a new folder, and refuse another search's."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settle(folder / KEY_FILE)
        new = not any(folder.iterdir())
    except OSError as error:
        raise _HEAD.refused(folder, error) from error
    if new:
        _write(folder / KEY_FILE, _HEAD.dumps(own))
    if _HEAD.read(folder / KEY_FILE, folder) != own:
        raise _HEAD.refused(folder, "a search of another model, recording or request")


def _write(path: Path, text: str) -> None:
    with atomic_path(path, _NEW) as temporary:
        temporary.write_text(text)
