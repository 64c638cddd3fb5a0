"""Facts of a plan, an artifact, a recording or an ONNX file, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from calicache.tools.artifact_facts import ArtifactFacts
from calicache.tools.artifact_view import describe_artifact
from calicache.tools.facts import Caution
from calicache.tools.inspect_target import Facts
from calicache.tools.onnx_view import describe_onnx
from calicache.tools.plan_facts import PlanFacts
from calicache.tools.plan_view import describe_plan
from calicache.tools.recording_facts import RecordingFacts
from calicache.tools.recording_view import describe_recording
from calicache.tools.terminal_text import title


def describe_facts(facts: Facts) -> RenderableType:
    """Everything `calicache inspect` prints, top to bottom."""
    if isinstance(facts, PlanFacts):
        parts = describe_plan(facts)
    elif isinstance(facts, ArtifactFacts):
        parts = describe_artifact(facts)
    elif isinstance(facts, RecordingFacts):
        parts = describe_recording(facts)
    else:
        parts = describe_onnx(facts)
    return Group(*parts, *_warnings(facts.warnings))


def _warnings(warnings: Sequence[Caution]) -> Iterator[RenderableType]:
    if warnings:
        yield title("Warnings")
    for caution in warnings:
        yield Text(f"- {caution.text}", style="yellow")
