"""What a bare ONNX file holds: form, operators, graphs inside, weights, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from calicache.export.artifact.manifest import MANIFEST_FILE, read_manifest
from calicache.graph_passes.common.errors import ArtifactError
from calicache.graph_passes.common.hashing import sha256_of
from calicache.tools.inspect.facts import Caution, some_names
from calicache.tools.inspect.onnx_macs import node_macs
from calicache.tools.terminal.subject import OnnxTarget


@dataclass(frozen=True, slots=True)
class ValueFacts:
    """An input or output: its type, and its sizes; a name for a size that may vary, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name} {self.dtype} of any shape"
        sizes = ("?" if size is None else str(size) for size in self.shape)
        return f"{self.name} {self.dtype} ({', '.join(sizes)})"


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """One graph of the model, without those inside of it.

    Attributes:
        place: `main`, or the node and attribute that hold it, `If "is_refresh" then_branch`.
        depth: 0 for the main graph, 1 for one inside of it, ...
        nodes: how many there are.
        macs: multiply-accumulates of one run of it, as far as they are known.
        unknown: nodes whose MACs are not known.
    """

    place: str
    depth: int
    nodes: int
    macs: int
    unknown: int


@dataclass(frozen=True, slots=True)
class ExternalFacts:
    """A file with weights outside of the model.

    Attributes:
        location: as the model has it, from the model's folder.
        tensors: how many lie in it.
        needed: bytes up to the end of the last of them.
        size: of the file in bytes; None where there is none.
    """

    location: str
    tensors: int
    needed: int
    size: int | None


@dataclass(frozen=True, slots=True)
class OnnxFacts:
    """Everything that is shown of an ONNX file.

    Attributes:
        kind: `onnx`.
        path: of the file; `bytes` and `sha256` of it.
        ir_version, opsets, producer, producer_version, graph: as the file has them; opsets by
            domain, `ai.onnx` for the one without a name.
        inputs, outputs: of the main graph, initializers left out.
        operators: how many nodes of each kind in all graphs, the most frequent first.
        graphs: the main graph and all inside of it, functions last.
        initializers: how many, over all graphs; `initializer_bytes` of all of them.
        external: files with weights outside of the model.
        artifact: the folder of the artifact that the file is a part of, or None.
        warnings: what a user should know.
    """

    kind: Literal["onnx"] = field(default="onnx", init=False)
    path: str
    bytes: int
    sha256: str
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    producer_version: str
    graph: str
    inputs: tuple[ValueFacts, ...]
    outputs: tuple[ValueFacts, ...]
    operators: Mapping[str, int]
    graphs: tuple[GraphFacts, ...]
    initializers: int
    initializer_bytes: int
    external: tuple[ExternalFacts, ...]
    artifact: str | None
    warnings: tuple[Caution, ...]


def onnx_facts(target: OnnxTarget) -> OnnxFacts:
    """Facts of an ONNX file."""
    model = with_shapes(target.model)
    tensors = list(_tensors(model))
    external = _external(tensors, target.path.parent)
    digest = sha256_of(target.path)
    artifact, belongs = _artifact(target.path, digest)
    graphs = tuple(_graph_facts(model))
    return OnnxFacts(
        path=str(target.path),
        bytes=target.path.stat().st_size,
        sha256=digest,
        ir_version=model.ir_version,
        opsets={name or "ai.onnx": number for name, number in model.opset_imports.items()},
        producer=model.producer_name or "",
        producer_version=model.producer_version or "",
        graph=model.graph.name or "",
        inputs=tuple(_value(v) for v in model.graph.inputs if not v.is_initializer()),
        outputs=tuple(_value(v) for v in model.graph.outputs),
        operators=operator_counts(model),
        graphs=graphs,
        initializers=len(tensors),
        initializer_bytes=sum(tensor.nbytes for tensor in tensors),
        external=external,
        artifact=artifact,
        warnings=(*belongs, *_cautions(model, external, graphs)),
    )


def operator_counts(model: ir.Model) -> dict[str, int]:
    """Nodes by operator over all graphs and functions, the most frequent first.

    Operators of another domain than ONNX's own carry its name, `com.microsoft.MultiHeadAttention`.
    """
    nodes = (node for _, _, graph in _graphs(model) for node in graph)
    counts = Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes)
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def with_shapes(model: ir.Model) -> ir.Model:
    """The model, or a copy with the shapes that can be inferred where some are missing."""
    products = [node for node in model.graph.all_nodes() if node_macs(node) is None]
    if not products:
        return model
    copy = model.clone()
    return ShapeInferencePass(check_type=False, strict_mode=False)(copy).model


def _graphs(model: ir.Model) -> Iterator[tuple[str, int, ir.Graph | ir.Function]]:
    yield from _nested("main", 0, model.graph)
    for name, function in model.functions.items():
        yield from _nested(f"function {'.'.join(part for part in name if part)}", 0, function)


def _nested(
    place: str, depth: int, graph: ir.Graph | ir.Function
) -> Iterator[tuple[str, int, ir.Graph | ir.Function]]:
    yield place, depth, graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                inside = [attribute.as_graph()]
            elif attribute.type is ir.AttributeType.GRAPHS:
                inside = list(attribute.as_graphs())
            else:
                continue
            for own in inside:
                label = f'{node.op_type} "{node.name or "?"}" {attribute.name}'
                yield from _nested(label, depth + 1, own)


def _graph_facts(model: ir.Model) -> Iterator[GraphFacts]:
    for place, depth, graph in _graphs(model):
        macs = [node_macs(node) for node in graph]
        known = [count for count in macs if count is not None]
        yield GraphFacts(place, depth, len(macs), sum(known), len(macs) - len(known))


def _value(value: ir.Value) -> ValueFacts:
    sizes = (
        None
        if value.shape is None
        else tuple(size if isinstance(size, int) else size.value for size in value.shape)
    )
    return ValueFacts(value.name or "", "?" if value.dtype is None else value.dtype.name, sizes)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every initializer of every graph that has values."""
    for _, _, graph in _graphs(model):
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                if value.const_value is not None:
                    yield value.const_value


def _external(tensors: Sequence[ir.TensorProtocol], folder: Path) -> tuple[ExternalFacts, ...]:
    found: dict[str, list[ir.ExternalTensor]] = {}
    for tensor in tensors:
        if isinstance(tensor, ir.ExternalTensor):
            found.setdefault(str(tensor.location), []).append(tensor)
    facts = []
    for location, members in sorted(found.items()):
        path = folder / location
        needed = max((t.offset or 0) + (t.length or t.nbytes) for t in members)
        size = path.stat().st_size if path.is_file() else None
        facts.append(ExternalFacts(location, len(members), needed, size))
    return tuple(facts)


def _artifact(path: Path, digest: str) -> tuple[str | None, tuple[Caution, ...]]:
    """The artifact that the file is a part of, by the manifest beside it."""
    folder = path.parent
    if not (folder / MANIFEST_FILE).is_file():
        return None, ()
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        return None, (Caution("manifest", f"A manifest beside the file cannot be read: {error}"),)
    record = next((record for record in manifest.files if record.name == path.name), None)
    if record is None:
        return None, (Caution("manifest", f"The artifact {folder} does not know this file."),)
    if record.sha256 != digest:
        text = f"The file is not the one that the artifact {folder} was written with."
        return str(folder), (Caution("changed", text),)
    text = f"The file is a part of the artifact {folder}: inspect that, it says more."
    return str(folder), (Caution("part-of-artifact", text),)


def _cautions(
    model: ir.Model, external: Sequence[ExternalFacts], graphs: Sequence[GraphFacts]
) -> Iterator[Caution]:
    for file in external:
        if file.size is None:
            yield Caution("weights-missing", f"The file {file.location} with weights is missing.")
        elif file.size < file.needed:
            yield Caution(
                "weights-cut",
                f"The file {file.location} has {file.size} bytes, the weights need {file.needed}.",
            )
    unknown = sum(graph.unknown for graph in graphs)
    if unknown:
        nodes = [node for _, _, graph in _graphs(model) for node in graph]
        kinds = sorted({node.op_type for node in nodes if node_macs(node) is None})
        yield Caution(
            "macs-unknown",
            f"MACs of {unknown} nodes are not known and left out: {some_names(kinds)}.",
        )
