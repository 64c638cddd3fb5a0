"""Facts of whatever a path is, and their JSON."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter

from calicache.tools.inspect.artifact_facts import ArtifactFacts, artifact_facts
from calicache.tools.inspect.onnx_facts import OnnxFacts, onnx_facts
from calicache.tools.inspect.plan_facts import PlanFacts, plan_facts
from calicache.tools.inspect.recording_facts import RecordingFacts, recording_facts
from calicache.tools.terminal.subject import (
    ArtifactTarget,
    PlanTarget,
    RecordingTarget,
    read_target,
)

Facts = PlanFacts | ArtifactFacts | RecordingFacts | OnnxFacts
FACTS: TypeAdapter[Facts] = TypeAdapter(Facts)


def inspect_target(path: Path | str) -> Facts:
    """What a plan, an artifact, a recording or an ONNX file is.

    Args:
        path: a folder or a file.

    Returns:
        One dataclass a kind; its field `kind` says which.

    Raises:
        TargetError: the path is none of the four, or a damaged ONNX file.
        PlanError, ArtifactError, RecordError: a damaged plan, artifact or recording.
    """
    target = read_target(path)
    if isinstance(target, PlanTarget):
        return plan_facts(target)
    if isinstance(target, ArtifactTarget):
        return artifact_facts(target)
    if isinstance(target, RecordingTarget):
        return recording_facts(target)
    return onnx_facts(target)


def facts_json(facts: Facts) -> str:
    """Facts as JSON.

    The keys are the attributes of the dataclass that `kind` names: `PlanFacts`, `ArtifactFacts`,
    `RecordingFacts` or `OnnxFacts`. Modes are their names; numbers that are not finite are null.
    """
    return FACTS.dump_json(facts, indent=2).decode()
