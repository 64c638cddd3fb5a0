"""What a long search has done already, in a folder: an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.files import atomic_path

KEY_FILE = "search.json"


@dataclass(frozen=True, slots=True)
class Journal:
    """Results by name; without a folder nothing is kept.

    Attributes:
        folder: made where it is missing.
    """

    folder: Path | None

    @staticmethod
    def open(folder: Path | str | None, key: str) -> Journal:
        """Begin a journal, or go on with one of the same search.

        Args:
            folder: for the results; None keeps nothing.
            key: what the results depend on: model, recording, request.

        Raises:
            PlanError: the folder holds something else, or another search.
        """
        if folder is None:
            return Journal(None)
        path = Path(folder)
        written = {"calicache": "search", "key": hashlib.sha256(key.encode()).hexdigest()}
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not any(path.iterdir()):
                _write(path / KEY_FILE, written)
            found = json.loads((path / KEY_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise _not_this_search(path, f"{type(error).__name__}: {error}") from error
        if found != written:
            raise _not_this_search(path, "a search of another model, recording or request")
        return Journal(path)

    def numbers(self, name: str, make: Callable[[], Any]) -> Any:
        """Plain data of that name: read, or made and kept."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name}.json"
        if path.exists():
            try:
                return json.loads(path.read_bytes())
            except (OSError, ValueError) as error:
                raise _not_this_search(path, f"{type(error).__name__}: {error}") from error
        value = make()
        _write(path, value)
        return value

    def tensors(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of that name: read, or made and kept."""
        if self.folder is None:
            return dict(make())
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return dict(load_file(path))
            except (OSError, SafetensorError) as error:
                raise _not_this_search(path, f"{type(error).__name__}: {error}") from error
        value = {key: tensor.contiguous().cpu() for key, tensor in make().items()}
        with atomic_path(path) as temporary:
            save_file(value, temporary)
        return value


def _write(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n")


def _not_this_search(path: Path, got: str) -> PlanError:
    return PlanError(
        str(path),
        expected="what an interrupted search of the same kind has kept",
        got=got,
        fix="Name another folder, or delete this one.",
    )
