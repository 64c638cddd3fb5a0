"""JSON that calicache writes and reads back: one reader for all formats, which believes nothing.

A document is a JSON object: the head, with its kind, the number of its format and a SHA-256 over
all the rest, then the fields of a dataclass. Before a value is made from one, its size, nesting
and number of values are bounded, the sum is right, and every field is of the type that the
dataclass names, in the range that is annotated there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json
from safetensors import SafetensorError

from calicache.graph_passes.common.disk.files import read_bounded
from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.errors import CalicacheError, reason_of

Value = TypeVar("Value")

MAX_BYTES, MAX_VALUES = 2**24, 250_000
DAMAGES = (OSError, ValueError, KeyError, SafetensorError, CalicacheError)


@dataclass(frozen=True, slots=True)
class DocumentKind(Generic[Value]):
    """One format.

    Attributes:
        name: what marks it.
        format: its number; a file of another one is refused.
        schema: of the dataclass that it holds.
        error: what is raised where a file is no such document.
        expected: the same in words, such as `a folder written by Plan.save`.
        fix: what the user can do.
        max_bytes, max_values: of the JSON; no larger one is looked into.
    """

    name: str
    format: int
    schema: TypeAdapter[Value]
    error: type[CalicacheError]
    expected: str
    fix: str
    max_bytes: int = MAX_BYTES
    max_values: int = MAX_VALUES

    @property
    def mark(self) -> str:
        """The `kind` that its head names."""
        return f"calicache {self.name}"

    def dumps(self, value: Value) -> str:
        """The document as text; the same value gives the same text.

        Raises:
            CalicacheError: of the kind `error`: a part is not of the type that it has to be.
        """
        try:
            fields = self.schema.dump_python(value, mode="json", warnings="error")
        except PydanticSerializationError as error:
            raise self.error(
                self.name,
                expected="values that can be read back",
                got=reason_of(error),
                fix="Make it again, of plain numbers and texts.",
            ) from error
        sum_ = sum_of(from_json(json.dumps(fields)))
        head = {"kind": self.mark, "format": self.format, "sha256": sum_}
        return json.dumps({**head, **fields}, indent=2) + "\n"

    def loads(self, text: bytes | str) -> Value:
        """The value of a document.

        Raises:
            ValueError: it is damaged, too large, or something else.
            CalicacheError: a part of the value refuses itself.
        """
        text = text.encode() if isinstance(text, str) else text
        content = self._object(text)
        if content.get("format", self.format) != self.format:
            raise ValueError(f"format {content['format']!r:.20}, this version reads {self.format}")
        if content.get("kind") != self.mark:
            raise ValueError(f"no JSON that is marked as {self.mark}")
        if content.get("sha256") != sum_of(content):
            raise ValueError("the content is not what it was saved with: its SHA-256 is another")
        try:
            return self.schema.validate_json(text, strict=True)
        except ValidationError as error:
            raise ValueError(_first_of(error)) from error

    def read(self, file: Path, path: Path | str | None = None) -> Value:
        """The value of a document in a file.

        Args:
            file: with the document.
            path: what the error names; the file where None.

        Raises:
            CalicacheError: of the kind `error`.
        """
        try:
            return self.loads(read_bounded(standing(file.parent) / file.name, self.max_bytes))
        except DAMAGES as error:
            raise self.refused(path or file, error) from error

    def head(self, file: Path) -> Mapping[str, Any] | None:
        """All fields of a document of any format number, unchecked; None where it is none."""
        try:
            content = self._object(read_bounded(file, self.max_bytes))
        except (OSError, ValueError):
            return None
        return content if content.get("kind") == self.mark else None

    def refused(self, path: Path | str, got: str | BaseException) -> CalicacheError:
        """The error for a file that is no such document, for the reason given."""
        return self.error(
            str(path),
            expected=self.expected,
            got=got if isinstance(got, str) else f"{type(got).__name__}: {got}",
            fix=self.fix,
        )

    def _object(self, text: bytes) -> Mapping[str, Any]:
        if len(text) > self.max_bytes:
            raise ValueError(f"more than the {self.max_bytes} bytes of any such document")
        if text.count(b",") > self.max_values:
            raise ValueError(f"more than the {self.max_values} values of any such document")
        content = from_json(text)
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        return content


def sum_of(content: Mapping[str, Any]) -> str:
    """SHA-256 over the fields of a document; how the JSON is spaced makes no difference."""
    fields = {key: value for key, value in content.items() if key not in ("kind", "sha256")}
    fields.pop("format", None)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _first_of(error: ValidationError) -> str:
    """The first thing that is wrong, with its place."""
    first, *_ = error.errors(include_url=False, include_context=False, include_input=False)
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}"
