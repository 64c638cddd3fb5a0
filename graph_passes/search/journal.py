"""What a long search has done already, in a folder: an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calicache.graph_passes.common.errors import PlanError, reason_of
from calicache.graph_passes.common.files import atomic_path

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
        calicache: what wrote it: `search`.
        key: digest of what the results depend on.
    """

    calicache: str
    key: str


_HEAD = TypeAdapter(_Head)


@dataclass(frozen=True, slots=True)
class Journal:
    """Results by kind and key; without a folder nothing is kept.

    Attributes:
        folder: made where it is missing.
    """

    folder: Path | None

    @staticmethod
    def open(path: Path | str | None, key: str) -> Journal:
        """Begin a journal, or go on with one of the same search.

        Args:
            path: a folder for the results; None keeps nothing.
            key: what the results depend on: model, recording, request.

        Raises:
            PlanError: the folder holds something else, or another search.
        """
        if path is None:
            return Journal(None)
        folder = Path(path)
        own = _Head("search", hashlib.sha256(key.encode()).hexdigest())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                _write(folder / KEY_FILE, _HEAD, own)
        except OSError as error:
            raise _not_this_search(folder, error) from error
        if _read(folder / KEY_FILE, _HEAD, folder) != own:
            raise _not_this_search(folder, "a search of another model, recording or request")
        return Journal(folder)

    def result(self, kind: EntryKind[Value], key: str, compute: Callable[[], Value]) -> Value:
        """One result: read, or computed and kept.

        Args:
            kind: what it is.
            key: which of its kind; empty where there is one.
            compute: makes it.

        Raises:
            PlanError: its file is damaged, or holds something else.
        """
        if self.folder is None:
            return compute()
        path = self.folder / f"{'-'.join(filter(None, (kind.name, key)))}.json"
        if path.exists():
            return _read(path, kind.schema, path)
        value = compute()
        _write(path, kind.schema, value)
        return value

    def tensors(self, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of that name: read, or computed and kept.

        Raises:
            PlanError: their file is damaged.
        """
        if self.folder is None:
            return dict(compute())
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return dict(load_file(path))
            except (OSError, SafetensorError) as error:
                raise _not_this_search(path, error) from error
        value = {key: tensor.contiguous().cpu() for key, tensor in compute().items()}
        with atomic_path(path) as temporary:
            save_file(value, temporary)
        return value


def _read(path: Path, schema: TypeAdapter[Value], where: Path) -> Value:
    try:
        return schema.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _not_this_search(where, error) from error


def _write(path: Path, schema: TypeAdapter[Value], value: Value) -> None:
    content = json.dumps(schema.dump_python(value, mode="json"))  # inf and nan stay what they are
    with atomic_path(path) as temporary:
        temporary.write_text(content + "\n")


def _not_this_search(path: Path, got: str | Exception) -> PlanError:
    return PlanError(
        str(path),
        expected="what an interrupted search of the same kind has kept",
        got=got if isinstance(got, str) else reason_of(got),
        fix="Name another folder, or delete this one.",
    )
