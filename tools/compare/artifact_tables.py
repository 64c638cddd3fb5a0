"""Numbers that an artifact looks up by step, read back out of its ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

from calicache.export.artifact.manifest import Manifest, model_file
from calicache.graph_passes.common.errors import CompareError
from calicache.graph_passes.rewriting.insertion import OUTPUT_WEIGHT, weight_name
from calicache.graph_passes.settings.choices import StepMode

# Of the node that scales x for the model in the `sampler` layout.
_SCALED_LATENT = "segment/scaled"
_LEAST_OWN = 0.1


@dataclass(frozen=True, slots=True)
class FirstStep:
    """How step 0 mixes its output: own e + latent x. Nothing else is kept yet.

    Where output weights were fitted, their row of step 0 is 1 and 0 up to the rounding of the
    recording, which in half precision is 1e-3.

    Attributes:
        own: weight of the plain model's output.
        latent: weight of the latent, in the output's channels that the latent has.
    """

    own: float
    latent: float

    def plain_output(self, output: Tensor, latent: Tensor) -> Tensor:
        """The plain model's output, from what step 0 made of it; channels alike, float32."""
        return (output - self.latent * latent) / self.own


def read_first_step(directory: Path | str, manifest: Manifest) -> FirstStep:
    """Weights of step 0 in an artifact in the layout `step` or `pair`.

    Raises:
        CompareError: the plain output has next to no part in step 0.
    """
    model = ir.load(Path(directory) / model_file(manifest.layout, StepMode.REFRESH))
    look_ups = {node.name: node for node in model.graph if node.op_type == "Gather"}

    def weight(place: int, without: float) -> float:
        node = look_ups.get(weight_name(OUTPUT_WEIGHT, place))
        return without if node is None else _first_entry(node)

    found = FirstStep(weight(0, 1.0), weight(manifest.history + 1, 0.0))
    if abs(found.own) < _LEAST_OWN:
        raise CompareError(
            "output weights",
            expected="a step 0 that returns the plain model's output",
            got=f"one with a weight of {found.own:.2g} for it",
            fix="Make the plan again from the recording, and export it.",
        )
    return found


def read_latent_scale(directory: Path | str, manifest: Manifest) -> float:
    """What a model in the `sampler` layout multiplies the noise with before its first call."""
    model = ir.load(Path(directory) / model_file(manifest.layout, StepMode.REFRESH))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.name == _SCALED_LATENT:
            look_up = node.inputs[1].producer()  # type: ignore[union-attr]
            assert look_up is not None
            return _first_entry(look_up)
    return 1.0


def _first_entry(look_up: ir.Node) -> float:
    table = look_up.inputs[0]
    assert table is not None
    assert table.const_value is not None
    return float(table.const_value.numpy()[0])
