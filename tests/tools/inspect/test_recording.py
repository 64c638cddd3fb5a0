"""What is said of a recording, and the warnings."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from support.small.subjects import codes, printed, small_model, small_runs, texts

from calicache.graph_passes import Dependence, Recording, StepMode
from calicache.tools.inspect.recording import RecordingFacts, RunFacts, recording_facts
from calicache.tools.terminal.text import json_text

R, C, U, F = StepMode


def facts_of_runs(home: Path, recording: Recording) -> RecordingFacts:
    return recording_facts(*(home / "runs.safetensors", recording))


def test_recording_facts(home: Path) -> None:
    recording = small_runs(small_model(), runs=3)
    facts = facts_of_runs(home, recording)
    assert facts.runs == (RunFacts(6, True),) * 3
    assert (facts.calls, facts.steps, facts.calls_per_step) == (18, 6, 1)
    assert [spec.dependence for spec in facts.inputs] == [Dependence.LATENT, Dependence.STEP]
    assert facts.timestep_values == tuple(float(torch.tensor(1 - k / 6)) for k in range(6))
    values = 18 * 4 * (2 * 5 * 4 + 2) + 3 * 4 * 2 * 5 * 4  # calls and results, float32
    assert facts.value_bytes == values
    assert not facts.warnings


def test_few_runs_and_missing_results_are_warned_of(home: Path) -> None:
    facts = facts_of_runs(home, small_runs(small_model(), runs=2, finish=False))
    assert texts(facts) == {
        "few-runs": "2 runs: a plan search needs 3 or more.",
        "no-results": "2 of 2 runs have no result, as finish() keeps it: the sampler's last "
        "update is not known.",
    }


def test_runs_of_other_lengths_and_broken_values_are_warned_of(home: Path) -> None:
    recording = small_runs(small_model(), runs=3)
    cut = recording.take_runs([0, 1, 2])
    cut.calls[:2] = []
    cut.calls[5] = {**cut.calls[5], "x": torch.full((2, 5, 4), torch.nan)}
    shifted = {number - 2: value for number, value in cut.results.items()}
    cut.results.clear()
    cut.results.update(shifted)
    facts = facts_of_runs(home, cut)
    assert texts(facts) == {
        "uneven-runs": "Runs of 4 to 6 steps.",
        "not-finite": "NaN or Inf among the values of x.",
    }


def test_a_recording_of_one_step_has_unknown_dependence(home: Path) -> None:
    recording = small_runs(small_model())
    short = Recording(recording.calls[:1], recording.signature)
    facts = facts_of_runs(home, short)
    assert [spec.dependence for spec in facts.inputs] == [None, None]
    assert texts(facts)["dependence-unknown"] == (
        "What the inputs depend on is not known: dependence: recording: expected a run of at "
        "least 2 steps, got 1 step. Record a whole sampler run."
    )
    assert codes(facts)[-1] == "no-timestep"
    data = json.loads(json_text(facts))
    assert [spec["dependence"] for spec in data["inputs"]] == [None, None]
    assert re.search(r"^ x +float32 +\(2, 5, 4\) +unknown$", printed(facts), re.MULTILINE)
