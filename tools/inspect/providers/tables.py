"""What the execution providers of ONNX Runtime have kernels for, as they publish it.

A file for every provider in the folder `kernels`, made from its pages by
`calicache.tools.inspect.providers.remake`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from calicache.graph_passes.common.errors import SubjectError

OPSET = 20  # of the graphs that calicache exports
FOLDER = Path(__file__).with_name("kernels")
SUFFIX = "ExecutionProvider"
_OTHER_NAMES = {"directml": "dml"}


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: what its inputs may be.

    Attributes:
        inputs: a name of `types` for every input, a type itself, or '' for any; by form of the
            call. Empty where the page says nothing of types.
        types: element types by name, such as `float16`.
        note: what else the page asks for, in its words.
    """

    inputs: tuple[tuple[str, ...], ...] = ()
    types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    note: str = ""

    def takes(self, types: Sequence[str]) -> bool:
        """Whether inputs of these types, '' for one that is left out, suit it."""
        # Where no form has as many, the last input of one stands for a list of them.
        forms = [form for form in self.inputs if len(form) >= len(types)] or self.inputs
        return not self.inputs or any(self._suits(form, types) for form in forms)

    def _suits(self, form: Sequence[str], types: Sequence[str]) -> bool:
        if types and not form:
            return False
        names = (form[min(place, len(form) - 1)] for place in range(len(types)))
        return all(
            not kind or not name or kind in self.types.get(name, (name,))
            for kind, name in zip(types, names, strict=True)
        )


@dataclass(frozen=True, slots=True)
class KernelTable:
    """Kernels of a provider for the operators of one opset.

    Attributes:
        source: where the table was published, with its version.
        opset: of the domain ai.onnx; those of com.microsoft are version 1.
        kernels: by operator, `Gemm` or `com.microsoft:Gelu`.
        types: that a value may have; empty where each kernel has its own, or the page has none.
    """

    source: str
    opset: int
    kernels: Mapping[str, tuple[Kernel, ...]]
    types: tuple[str, ...] = ()

    @property
    def has_types(self) -> bool:
        """Whether the page tells types, and not operators alone."""
        listed = (kernel for kernels in self.kernels.values() for kernel in kernels)
        return bool(self.types) or any(kernel.inputs for kernel in listed)

    def takes(self, operator: str, types: Sequence[str]) -> bool:
        """Whether there is a kernel for inputs of these types, '' for one that is left out."""
        if self.types and not {*types} <= {"", *self.types}:
            return False
        return any(kernel.takes(types) for kernel in self.kernels.get(operator, ()))


ADAPTER = TypeAdapter(KernelTable)


def table_file(provider: str) -> Path:
    """Where the table of a provider lies."""
    return FOLDER / f"{provider}.json"


def known_providers() -> list[str]:
    """Those with a table, in the order of their names."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


@cache
def kernel_table(provider: str) -> KernelTable:
    """The table that ships with calicache."""
    return ADAPTER.validate_json(table_file(provider).read_bytes())


def find_provider(name: str) -> str:
    """The provider of a name: `CUDAExecutionProvider`, or `cuda`.

    Raises:
        SubjectError: there is no table of it.
    """
    known = known_providers()
    short = name.casefold().removesuffix(SUFFIX.casefold())
    short = _OTHER_NAMES.get(short, short)
    for provider in known:
        if provider.removesuffix(SUFFIX).casefold() == short:
            return provider
    raise SubjectError(
        "provider",
        expected=" | ".join(known),
        got=repr(name),
        fix="Choose one of these, or its first part, such as cuda.",
    )


def operator_name(domain: str, operator: str) -> str:
    """As the tables and `calicache inspect` call an operator."""
    return f"{domain}:{operator}" if domain else operator
