"""What an execution provider has no kernels for in an artifact, and where values are copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.text import Text

from calicache.export.artifact.folder import load_artifact
from calicache.export.artifact.manifest import model_file
from calicache.tools.inspect.providers.placement import (
    Copy,
    PlacedNode,
    body_graphs,
    find_copies,
    place_nodes,
)
from calicache.tools.inspect.providers.tables import KernelTable, find_provider, kernel_table
from calicache.tools.terminal.text import fact_grid, plain_table, title

# What a provider asks for and its table has no place for.
REMARKS: Mapping[str, str] = {
    "CPUExecutionProvider": "Some kernels for float16 are those of Arm processors alone.",
    "CoreMLExecutionProvider": (
        "Of models in the format MLProgram, and without the option EnableOnSubgraphs."
    ),
    "OpenVINOExecutionProvider": (
        "Of a CPU or a GPU. ONNX Runtime 1.24.1 with OpenVINO 2025.4 ran the layouts pair and step "
        "and did not load sampler, whose bodies read values from outside of them."
    ),
    "QNNExecutionProvider": (
        "Which types are taken depends on the backend, and every shape has to be fixed."
    ),
    "WebGpuExecutionProvider": (
        "Integers of 64 bits are taken with the provider's option enable_int64 alone, and float16 "
        "where the device has shader-f16."
    ),
}


@dataclass(frozen=True, slots=True)
class HostOperator:
    """Nodes of one kind that run on the host.

    Attributes:
        model: the file.
        operator: `Equal`, or with its domain.
        types: of the inputs.
        count: of the nodes.
    """

    model: str
    operator: str
    types: tuple[str, ...]
    count: int


@dataclass(frozen=True, slots=True)
class KernelNote:
    """What the page asks for of an operator that the provider runs here.

    Attributes:
        operator: `Conv`, or with its domain.
        count: of the nodes in all models.
        text: in the words of the page.
    """

    operator: str
    count: int
    text: str


@dataclass(frozen=True, slots=True)
class ProviderFacts:
    """An artifact as a provider would run it.

    Attributes:
        provider: of ONNX Runtime.
        source: where its kernels are from.
        has_types: whether types were looked at: some pages name operators alone.
        nodes: of all models.
        host: those without a kernel.
        copies: what that costs.
        notes: what to look at by hand in the rest.
        remarks: sentences on the provider, and on a layout that suits it better.
    """

    provider: str
    source: str
    has_types: bool
    nodes: int
    host: tuple[HostOperator, ...]
    copies: tuple[Copy, ...]
    notes: tuple[KernelNote, ...]
    remarks: tuple[str, ...]


def provider_facts(path: Path, provider: str) -> ProviderFacts:
    """Which nodes of an artifact a provider would leave to the host.

    Args:
        path: the folder of an artifact.
        provider: one that ONNX Runtime publishes kernels of, such as CUDAExecutionProvider or cuda.

    Raises:
        SubjectError: it publishes none of this provider.
        ArtifactError: the path is no artifact, or a damaged one.
    """
    manifest = load_artifact(path)
    files = sorted({model_file(manifest.layout, mode) for mode in manifest.schedule})
    return facts_of_models({file: ir.load(path / file) for file in files}, provider)


def facts_of_models(models: Mapping[str, ir.Model], provider: str) -> ProviderFacts:
    """The same of models by the names of their files.

    Raises:
        SubjectError: ONNX Runtime publishes no kernels of the provider.
    """
    provider = find_provider(provider)
    table = kernel_table(provider)
    placed = {file: place_nodes(model.graph, provider) for file, model in models.items()}
    entries = [*chain.from_iterable(placed.values())]
    host = Counter(
        (file, entry.operator, entry.types)
        for file, listed in placed.items()
        for entry in listed
        if entry.on_host
    )
    copies = (find_copies(file, listed, provider) for file, listed in placed.items())
    return ProviderFacts(
        provider,
        table.source,
        table.has_types,
        len(entries),
        tuple(HostOperator(*kind, count) for kind, count in sorted(host.items())),
        tuple(chain.from_iterable(copies)),
        tuple(_notes(entries, table)),
        tuple(_remarks(entries, provider)),
    )


def _notes(entries: Sequence[PlacedNode], table: KernelTable) -> Iterator[KernelNote]:
    counts = Counter(entry.operator for entry in entries if not entry.on_host)
    for operator, count in sorted(counts.items()):
        for kernel in table.kernels.get(operator, ()):
            if kernel.note:
                yield KernelNote(operator, count, kernel.note)


def _remarks(entries: Sequence[PlacedNode], provider: str) -> Iterator[str]:
    if provider in REMARKS:
        yield REMARKS[provider]
    on_host = [entry for entry in entries if entry.on_host]
    flows = sorted({entry.operator for entry in on_host if body_graphs(entry.node)})
    if flows:
        inside = sum(bool(entry.place) for entry in on_host)
        yield (
            f"{' and '.join(flows)} would run on the host, and of the nodes in bodies {inside}: "
            "the layout pair has no control flow."
        )
    own = sorted({entry.operator for entry in on_host if entry.node.domain})
    if own:
        yield (
            f"{' and '.join(own)}: of ONNX Runtime's own operators; "
            'export_onnx(attention="standard") writes attention in those of ONNX.'
        )


def describe_provider(facts: ProviderFacts) -> RenderableType:
    """What `calicache inspect --provider` prints."""
    on_host = sum(kind.count for kind in facts.host)
    grid = fact_grid(
        [
            ("provider", facts.provider),
            ("kernels", facts.source),
            ("types", "looked at" if facts.has_types else "any: the page names operators alone"),
            ("nodes", f"{facts.nodes}, {on_host} of them on the host"),
        ]
    )
    host = (
        (kind.model, kind.operator, _types_in_words(kind.types), str(kind.count))
        for kind in facts.host
    )
    copies = (
        (
            copy.model,
            copy.value,
            " in ".join(reversed(copy.place)) or "once",
            copy.to,
            "?" if copy.elements is None else str(copy.elements),
        )
        for copy in facts.copies
    )
    notes = ((note.operator, note.text, str(note.count)) for note in facts.notes)
    return Group(
        grid,
        *(Text(f"- {remark}") for remark in facts.remarks),
        title("Operators without a kernel"),
        plain_table(("model", "operator", "inputs"), ("nodes",), host),
        title("Copies"),
        plain_table(("model", "value", "where", "to"), ("elements",), copies),
        *([title("What the page asks for")] if facts.notes else []),
        *([plain_table(("operator", "note"), ("nodes",), notes)] if facts.notes else []),
    )


def _types_in_words(types: Sequence[str]) -> str:
    """`int64, 52 float16`: a Loop takes a lot of one type."""
    runs = ((kind, len([*same])) for kind, same in groupby(types))
    return ", ".join(
        f"{count} {kind}" if count > 2 else ", ".join([kind] * count) for kind, count in runs
    )
