"""Artifacts that are exported once in a test run, quickly, and looking into graphs and sessions."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from filelock import FileLock
from torch import fx
from torch._export import utils
from torch.onnx._internal.exporter._registration import ONNXRegistry

from calicache.export import Layout, Session, export_onnx
from calicache.graph_passes import OptimizedModel
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.graph import capture
from calicache.graph_passes.sampler.tables import SamplerTables

RECOMPILE = fx.GraphModule.recompile  # torch's own
RUN_FOLDER = "CALICACHE_TEST_RUN"  # in the environment: of all processes of a test run


def shared_artifact(name: str, make: Callable[[Path], object]) -> Path:
    """What `make` writes to a path, made by the first process of a test run that asks for it.

    Nobody may change it.
    """
    path = Path(os.environ[RUN_FOLDER]) / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial = path.with_name(f"{name}.partial")
            make(partial)
            partial.rename(path)
    return path


def exported(
    fast: OptimizedModel,
    layout: Layout | str = Layout.STEP,
    sampler: SamplerTables | None = None,
    **wishes: Any,
) -> Path:
    """The artifact of a model, exported once in a test run; for reading alone."""
    plan = fast.plan  # which prints in a few lines, not as all that it is
    decides = (plan.binding, plan.recipe, plan.sampler, plan.front, sampler, wishes)
    content = hashlib.sha256(repr(decides).encode())
    for variant in fast.compiled.variant_set.variants.values():
        content.update(f"{variant.module.graph} {hash_weights(variant.module)}".encode())
    name = f"{layout} {content.hexdigest()[:16]}.onnx.d"
    return shared_artifact(
        name, lambda path: export_onnx(fast, path, layout=layout, sampler=sampler, **wishes)
    )


@contextmanager
def quick_exports() -> Iterator[None]:
    """torch.export and torch.onnx without what nobody reads: about half of the time they take.

    A capture notes a stack for every node, and makes code of some 25 graphs on its way that never
    run; one that runs after all gets its code then. torch.onnx parses its 500 functions whenever
    it is called, and both look through all operations that there are.
    """
    export, capturing = capture._export, threading.local()

    def export_lazily(*arguments: Any) -> Any:
        capturing.now = True
        try:
            return export(*arguments)
        finally:
            capturing.now = False

    def recompile_later(module: fx.GraphModule) -> Any:
        if not getattr(capturing, "now", False):
            return RECOMPILE(module)

        def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            RECOMPILE(self)
            return type(self).forward(self, *args, **kwargs)

        names = [node.target for node in module.graph.nodes if node.op == "placeholder"]
        if tree := getattr(module.graph._codegen, "pytree_info", None):
            module._in_spec, module._out_spec = tree.in_spec, tree.out_spec
            names = tree.orig_args
        # torch.export calls its inputs as the arguments are called.
        own = [name for name in names if name != "self"]
        kind = Parameter.POSITIONAL_OR_KEYWORD
        forward.__signature__ = Signature([Parameter(name, kind) for name in ("self", *own)])
        vars(module).setdefault("_code", "")
        type(module).forward = forward
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fx.config, "do_not_emit_stack_traces", True)
        patch.setattr(capture, "_export", export_lazily)
        patch.setattr(fx.GraphModule, "recompile", recompile_later)
        registry = staticmethod(cache(ONNXRegistry.from_torchlib))
        patch.setattr(ONNXRegistry, "from_torchlib", registry)
        patch.setattr(utils, "_materialize_cpp_cia_ops", cache(utils._materialize_cpp_cia_ops))
        yield


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all graphs inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)


def kept_refreshes(session: Session, call: int = 0) -> list[dict[str, ort.OrtValue]]:
    """What a session keeps on its device, the newest values of all caches first."""
    kept, caches = session._run.kept[call], session.manifest.caches
    held = {name: min(count, kept.depths[name]) for name, count in kept.counts.items()}
    return [
        {cache.name: kept.read(cache, back) for cache in caches if back < held[cache.name]}
        for back in range(max(held.values(), default=0))
    ]
