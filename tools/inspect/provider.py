"""What an execution provider has no kernels for in an artifact, and where values are copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import onnx_ir as ir
from rich.console import Group, RenderableType

from calicache.export.artifact.folder import load_artifact
from calicache.export.artifact.manifest import model_file
from calicache.graph_passes.common.errors import SubjectError
from calicache.tools.inspect.kernel_table import HOST_INPUTS, Kernel, kernel_table, operator_name
from calicache.tools.terminal.text import fact_grid, plain_table, title

# As ONNX Runtime's table calls what onnx calls FLOAT and so on.
_TYPE_NAMES = {"FLOAT": "float", "DOUBLE": "double"}


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
class Copy:
    """A value that goes from one side to the other.

    Attributes:
        model: the file.
        value: its name; `elements` how many numbers it has, None where that is not known.
        to: `host` or the provider.
        place: the control flow that it lies in, outermost first; empty where it is copied once.
    """

    model: str
    value: str
    elements: int | None
    to: str
    place: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProviderFacts:
    """An artifact as a provider would run it.

    Attributes:
        provider: of ONNX Runtime.
        source: where its kernels are from.
        nodes: of all models.
        host: those without a kernel.
        copies: what that costs.
    """

    provider: str
    source: str
    nodes: int
    host: tuple[HostOperator, ...]
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class _Placed:
    node: ir.Node
    place: tuple[str, ...]
    on_host: bool


def provider_facts(path: Path, provider: str) -> ProviderFacts:
    """Which nodes of an artifact a provider would leave to the host.

    Args:
        path: the folder of an artifact.
        provider: one that ONNX Runtime publishes kernels of.

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
    table = kernel_table()
    if provider not in table.providers:
        raise SubjectError(
            "provider",
            expected=" | ".join(table.providers),
            got=repr(provider),
            fix="Choose one of these: of others ONNX Runtime publishes no kernels.",
        )
    kernels = table.providers[provider]
    placed = {file: [*_placed(model.graph, kernels)] for file, model in models.items()}
    host: Counter[tuple[str, str, tuple[str, ...]]] = Counter(
        (file, _name(entry.node), _input_types(entry.node))
        for file, entries in placed.items()
        for entry in entries
        if entry.on_host
    )
    two_sides = provider != "CPUExecutionProvider"
    copies = (_copies(file, entries, provider) for file, entries in placed.items() if two_sides)
    return ProviderFacts(
        provider,
        table.source,
        sum(map(len, placed.values())),
        tuple(HostOperator(*kind, count) for kind, count in sorted(host.items())),
        tuple(chain.from_iterable(copies)),
    )


def _placed(
    graph: ir.Graph, kernels: Mapping[str, tuple[Kernel, ...]], place: tuple[str, ...] = ()
) -> Iterator[_Placed]:
    """All nodes, those in bodies too, each with its side."""
    for node in graph:
        types = _input_types(node)
        suited = any(kernel.takes(types) for kernel in kernels.get(_name(node), ()))
        yield _Placed(node, place, not suited and node.op_type != "Constant")
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from _placed(attribute.as_graph(), kernels, (*place, node.op_type))


def _copies(file: str, entries: list[_Placed], provider: str) -> Iterator[Copy]:
    """Values that a node of the one side makes and a node of the other reads, once for a side."""
    makers = {output: entry for entry in entries for output in entry.node.outputs}
    seen = set()
    for entry in entries:
        host_inputs = HOST_INPUTS.get(_name(entry.node), ())
        for place, value in enumerate(entry.node.inputs):
            maker = makers.get(value) if value is not None else None
            on_host = entry.on_host or place in host_inputs
            if value is None or maker is None or maker.on_host == on_host:
                continue
            to = "host" if on_host else provider
            if (value, to) not in seen:
                seen.add((value, to))
                yield Copy(file, str(value.name), _elements(value), to, entry.place)


def _name(node: ir.Node) -> str:
    return operator_name(node.domain, node.op_type)


def _input_types(node: ir.Node) -> tuple[str, ...]:
    """Types of the inputs as the table names them, '' for one that is left out."""
    dtypes = (None if value is None else value.dtype for value in node.inputs)
    return tuple("" if of is None else _TYPE_NAMES.get(of.name, of.name.lower()) for of in dtypes)


def _elements(value: ir.Value) -> int | None:
    if value.shape is None or not value.shape.is_static():
        return None
    product = 1
    for length in value.shape.numpy():
        product *= length
    return product


def describe_provider(facts: ProviderFacts) -> RenderableType:
    """What `calicache inspect --provider` prints."""
    on_host = sum(kind.count for kind in facts.host)
    grid = fact_grid(
        [
            ("provider", facts.provider),
            ("kernels", facts.source),
            ("nodes", f"{facts.nodes}, {on_host} of them on the host"),
        ]
    )
    host = (
        (kind.model, kind.operator, ", ".join(kind.types), str(kind.count)) for kind in facts.host
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
    return Group(
        grid,
        title("Operators without a kernel"),
        plain_table(("model", "operator", "inputs"), ("nodes",), host),
        title("Copies"),
        plain_table(("model", "value", "where", "to"), ("elements",), copies),
    )
