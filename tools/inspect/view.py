"""Facts of a plan, an artifact, a recording or an ONNX file, as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from calicache.tools.inspect.artifact_facts import ArtifactFacts
from calicache.tools.inspect.artifact_view import describe_artifact
from calicache.tools.inspect.facts import Caution
from calicache.tools.inspect.onnx_view import describe_onnx
from calicache.tools.inspect.plan_facts import PlanFacts
from calicache.tools.inspect.plan_view import describe_plan
from calicache.tools.inspect.recording_facts import RecordingFacts
from calicache.tools.inspect.recording_view import describe_recording
from calicache.tools.inspect.subject_facts import Facts
from calicache.tools.terminal.text import title


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
