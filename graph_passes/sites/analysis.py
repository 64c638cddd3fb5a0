"""A model looked at once: its graph, what its values depend on, its sites, its costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from calicache.graph_passes.common.errors import CaptureError
from calicache.graph_passes.graph.capture import CapturedGraph, capture
from calicache.graph_passes.graph.checks import verify_captured
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.graph.macs import count_macs
from calicache.graph_passes.graph.pointwise import pointwise_to_linear
from calicache.graph_passes.graph.run_values import find_run_values
from calicache.graph_passes.graph.whole import WHOLE, capture_whole
from calicache.graph_passes.recording.binding import Binding
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.sites.sites import Sites, find_sites


@dataclass(frozen=True, slots=True)
class Analysis:
    """What a model is for calls of one form, whatever a recipe makes of it.

    Attributes:
        binding: the form of the calls, and how the inputs behave.
        include, exclude: shell patterns over site names that were asked for.
        captured: the plain graph.
        classes: what every node depends on, by name.
        sites: layers and branches where caches can go.
        run_values: nodes that stay the same over a run and take products to make.
        macs: multiply-accumulates of every node that is a product, by name.
    """

    binding: Binding
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    captured: CapturedGraph
    classes: Mapping[str, Dependence]
    sites: Sites
    run_values: tuple[str, ...]
    macs: Mapping[str, int]

    @property
    def plain_macs(self) -> int:
        """Multiply-accumulates of one call of the plain model."""
        return sum(self.macs.values())

    @property
    def fixed(self) -> dict[str, tuple[str, ...]]:
        """The arguments whose recorded values are built into the graph, with their digests."""
        return {name: self.binding.run_values.get(name, ()) for name in self.captured.fixed}


def analyse(
    model: nn.Module,
    binding: Binding,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Analysis:
    """Capture a model for calls of one form, class its values, find its sites.

    Args:
        model: in eval mode; may be on the meta device.
        binding: from `bind`.
        include: shell patterns; a site needs to match one.
        exclude: shell patterns; a site may match none.

    Raises:
        CalicacheError: whatever stage refuses names itself.
    """
    captured = capture(model, binding.signature, binding.reads)
    captured = verify_captured(pointwise_to_linear(captured))
    _check_fixed_inputs(captured, binding)
    classes = classify_nodes(captured, binding.dependence)
    macs = count_macs(captured.graph)
    return Analysis(
        binding=binding,
        include=tuple(include),
        exclude=tuple(exclude),
        captured=captured,
        classes=classes,
        sites=find_sites(captured, classes, include, exclude),
        run_values=find_run_values(captured, classes, macs),
        macs=macs,
    )


def analyse_whole(model: nn.Module, binding: Binding, call: Mapping[str, Tensor]) -> Analysis:
    """A model as one value that is computed or forecast, without a look inside.

    Its cost is 1. The model is run once.

    Args:
        model: any module.
        binding: from `bind`.
        call: a call of the binding's form.
    """
    captured = verify_captured(capture_whole(model, binding.signature, call))
    return Analysis(
        binding=binding,
        include=(),
        exclude=(),
        captured=captured,
        classes=classify_nodes(captured, binding.dependence),
        sites=Sites((), (), (), ()),
        run_values=(),
        macs={WHOLE: 1},
    )


def _check_fixed_inputs(captured: CapturedGraph, binding: Binding) -> None:
    for name in captured.fixed:
        if binding.dependence[name] > Dependence.RUN:
            raise CaptureError(
                name,
                expected="control flow and sizes that stay the same over a run",
                got=f"some that depend on {name}, which changes from step to step",
                fix="A graph cannot follow such a decision; compute both sides, or mask.",
            )
