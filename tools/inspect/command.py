"""`calicache inspect`: facts of whatever a path is, as text or as JSON."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from calicache.export.artifact.manifest import Manifest
from calicache.graph_passes.api.plan import Plan
from calicache.tools.inspect.artifact import ArtifactFacts, artifact_facts, describe_artifact
from calicache.tools.inspect.plan import PlanFacts, describe_plan, plan_facts
from calicache.tools.inspect.providers.facts import describe_provider, provider_facts
from calicache.tools.inspect.recording import RecordingFacts, describe_recording, recording_facts
from calicache.tools.terminal.subject import read_subject
from calicache.tools.terminal.text import show_value, title

WARNINGS = 2  # exit code; 1 is for what is refused

Facts = PlanFacts | ArtifactFacts | RecordingFacts


def inspect(path: Path, json: bool, strict: bool, provider: str | None) -> None:
    """Print the facts of what a path is."""
    if provider is not None:
        show_value(provider_facts(path, provider), describe_provider, json=json)
        return
    facts = inspect_subject(path)
    show_value(facts, describe_facts, json=json)
    if strict and facts.warnings:
        raise typer.Exit(WARNINGS)


def inspect_subject(path: Path | str) -> Facts:
    """What a plan, an artifact or a recording is.

    Args:
        path: a folder or a file.

    Returns:
        One dataclass a kind; its field `kind` says which, in JSON too.

    Raises:
        SubjectError: the path is none of the three.
        PlanError, ArtifactError, RecordError: a damaged plan, artifact or recording.
    """
    subject, place = read_subject(path), Path(path)
    if isinstance(subject, Plan):
        return plan_facts(place, subject)
    if isinstance(subject, Manifest):
        return artifact_facts(place, subject)
    return recording_facts(place, subject)


def describe_facts(facts: Facts) -> RenderableType:
    """Everything `calicache inspect` prints, top to bottom."""
    if isinstance(facts, PlanFacts):
        parts = describe_plan(facts)
    elif isinstance(facts, ArtifactFacts):
        parts = describe_artifact(facts)
    else:
        parts = describe_recording(facts)
    heading = [title("Warnings")] if facts.warnings else []
    warnings = (Text(f"- {caution.text}", style="yellow") for caution in facts.warnings)
    return Group(*parts, *heading, *warnings)
