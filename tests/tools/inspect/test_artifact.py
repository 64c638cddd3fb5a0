"""What is said of an artifact, its layers, and the warnings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.small.subjects import (
    codes,
    other_artifact,
    printed,
    small_model,
    small_plan,
    small_runs,
    texts,
)
from torch import nn

from calicache.export import Layout, Manifest
from calicache.export.artifact.manifest import Attention, Precision, SamplerRecord
from calicache.export.artifact.open_sizes import OpenSize, SizeFormula
from calicache.graph_passes import SiteMode, SiteRule, StepMode
from calicache.graph_passes import optimize as compiled
from calicache.graph_passes.describe.graphs import view_graphs
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.tools.inspect.artifact import ArtifactFacts, artifact_facts
from calicache.tools.inspect.command import inspect_subject
from calicache.tools.inspect.facts import Caution
from calicache.tools.inspect.layers import LayerWork, fold_names, layer_facts

R, C, U, F = StepMode


def facts_of_artifact(home: Path, manifest: Manifest, **changes: object) -> ArtifactFacts:
    changed = replace(manifest, **changes)  # type: ignore[arg-type]
    return artifact_facts(home / "dit.onnx.d", changed)


def test_artifact_facts_are_those_of_the_manifest(home: Path, manifest: Manifest) -> None:
    facts = inspect_subject(home / "dit.onnx.d")
    assert isinstance(facts, ArtifactFacts)
    assert facts.manifest == manifest
    assert facts.run_share == manifest.run_share
    by_mode = {entry.mode: entry for entry in facts.modes}
    assert [entry.steps for entry in facts.modes] == [3, 1, 1, 1]
    assert [entry.macs for entry in facts.modes] == [record.macs for record in manifest.modes]
    assert by_mode[R].share == manifest.mode(R).macs / manifest.plain_macs
    # REFRESH keeps one of every cache; CALIBRATE reads the most, FORECAST the output alone.
    assert 2 * by_mode[R].written_bytes == facts.cache_bytes
    assert facts.cache_bytes >= by_mode[C].read_bytes > by_mode[U].read_bytes > 0
    assert by_mode[F].read_bytes == 2 * 4 * (2 * 5 * 4)  # two refreshes of (2, 5, 4) float32


def test_layers_follow_the_rules(home: Path) -> None:
    facts = inspect_subject(home / "dit.onnx.d")
    assert isinstance(facts, ArtifactFacts)
    work = {layer.name: layer.work["CALIBRATE"] for layer in facts.layers}
    assert work == {
        "embed": LayerWork.FULL,
        "blocks.0.fc1": LayerWork.REUSE,
        "blocks.0.fc2": LayerWork.REUSE,
        "blocks.1.fc1": LayerWork.FULL,
        "blocks.1.fc2": LayerWork.CALIBRATE,
        "blocks.2.fc1": LayerWork.CALIBRATE,
        "blocks.2.fc2": LayerWork.CALIBRATE,
        "out": LayerWork.FULL,
    }
    for layer in facts.layers:
        inside = layer.name.startswith("blocks")
        assert layer.work["REFRESH"] is LayerWork.FULL
        assert layer.work["REUSE"] is (LayerWork.SKIPPED if inside else LayerWork.FULL)
        assert layer.work["FORECAST"] is LayerWork.SKIPPED
    targets = {layer.name: layer.target for layer in facts.layers}
    assert (targets["blocks.0.fc2"], targets["blocks.1.fc1"]) == ("blocks.0", None)


@pytest.mark.slow
def test_calls_of_one_layer_are_told_apart() -> None:
    model = small_model()
    assert isinstance(model.blocks, nn.ModuleList)
    model.blocks[1] = model.blocks[0]
    rules = (SiteRule("blocks.1.fc1@1", SiteMode.FULL), SiteRule("blocks.1.fc2", SiteMode.REUSE))
    fast = compiled(model, small_plan(model, small_runs(model), rules=rules))
    layers = layer_facts(
        view_graphs(fast.compiled.captured, fast.compiled.variant_set), fast.compiled.targets
    )
    work = {layer.name: layer.work["CALIBRATE"].value for layer in layers}
    assert work["blocks.1.fc1"] == "calibrate"
    assert work["blocks.1.fc1@1"] == "full"
    assert work["blocks.1.fc2"] == "reuse"
    assert work["blocks.1.fc2@1"] == "calibrate"


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout.PAIR, Layout.SAMPLER])
def test_other_layouts(layout: Layout) -> None:
    facts = inspect_subject(other_artifact("RCUFRC", layout))
    assert isinstance(facts, ArtifactFacts)
    assert facts.manifest.layout == layout
    text = printed(facts)
    assert text.startswith(f"calicache artifact, layout {layout}\n")
    assert ("noise float32 (2, 5, 4)" in text) == (layout is Layout.SAMPLER)
    assert all(layer.work["REFRESH"] is LayerWork.FULL for layer in facts.layers)


def test_guidance_calls_and_built_in_values_are_shown(home: Path, manifest: Manifest) -> None:
    noise = TensorSpec("noise", (1, 5, 4), "float32")
    record = SamplerRecord("x", noise, (), parts=2, conditional=0, guidance=1.5, scale=1.0)
    facts = facts_of_artifact(
        home, manifest, sampler=record, calls_per_step=2, fixed={"mask": ("1234",)}
    )
    lines = printed(facts).splitlines()
    assert "                guidance scale 1.5" in lines
    assert "calls           2 of the model a step" in lines
    assert "built in        the recorded values of mask" in lines
    assert facts.cache_bytes == 2 * manifest.cache_bytes


def test_an_open_batch_and_standard_attention_are_shown(home: Path, manifest: Manifest) -> None:
    facts = facts_of_artifact(
        home,
        manifest,
        attention=Attention.STANDARD,
        open_sizes={"x": (OpenSize(0, SizeFormula(True, 1, {})),)},
    )
    assert "attention       in standard operators" in printed(facts)
    assert "open sizes      batch; shapes and figures are those" in printed(facts)
    plain = printed(facts_of_artifact(home, manifest))
    assert "attention  " not in plain
    assert "open sizes" not in plain


def test_a_precision_is_shown_where_it_is_not_float32(home: Path, manifest: Manifest) -> None:
    text = printed(facts_of_artifact(home, manifest, precision=Precision.INT8))
    assert "precision       int8 in the linear layers of residual branches" in text
    assert "precision  " not in printed(facts_of_artifact(home, manifest))


def test_large_caches_are_warned_of(home: Path, manifest: Manifest) -> None:
    facts = inspect_subject(home / "dit.onnx.d")
    assert codes(facts) == ["large-caches"]
    assert not facts_of_artifact(home, manifest, cache_bytes=1).warnings


def test_low_energy_is_warned_of_where_it_counts(home: Path, manifest: Manifest) -> None:
    low = tuple(replace(t, energy=0.25 if t.rank else None) for t in manifest.targets)
    facts = facts_of_artifact(home, manifest, targets=low)
    assert texts(facts)["low-energy"] == (
        "Energy kept is below 0.5 in blocks.1.fc2 (0.25), blocks.2.fc1 (0.25), blocks.2.fc2 (0.25)"
        ": raise their ranks."
    )
    without = facts_of_artifact(home, manifest, targets=low, schedule=(R, U, R, U, R, F))
    assert "low-energy" not in codes(without)


def test_costs_that_save_nothing_are_warned_of(home: Path, manifest: Manifest) -> None:
    dear = tuple(replace(t, calibrate_macs=t.full_macs) for t in manifest.targets)
    texts = [c.text for c in facts_of_artifact(home, manifest, targets=dear).warnings]
    names = "blocks.0, blocks.1.fc2, blocks.2.fc1, blocks.2.fc2"
    assert f"A calibration branch costs as much as the layers: {names}." in texts
    cheap = facts_of_artifact(home, manifest, plain_macs=1000)
    assert cheap.run_share > 1
    assert (
        Caution("no-saving", f"A run takes {cheap.run_share:.3f} of the plain model's MACs.")
        in cheap.warnings
    )


def test_files_that_the_manifest_does_not_know_are_warned_of(copy: Path) -> None:
    (copy / "dit.onnx.d" / "notes.txt").touch()
    facts = inspect_subject(copy / "dit.onnx.d")
    assert texts(facts)["other-files"] == (
        "The manifest does not know notes.txt, which lie in the folder."
    )


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["blocks.0.fc1", "blocks.1.fc1", "blocks.3.fc1"], "blocks.{0-1,3}.fc1"),
        (["blocks.7.fc1"], "blocks.7.fc1"),
        (["embed"], "embed"),
        (["layers.9", "layers.10"], "layers.{9-10}"),
        (["0.a.1", "1.a.1"], "{0-1}.a.1"),
    ],
)
def test_names_that_differ_in_one_number_are_one(names: list[str], folded: str) -> None:
    assert fold_names(names) == folded


def test_targets_are_shown_where_steps_calibrate(home: Path, manifest: Manifest) -> None:
    assert "Calibration targets" in printed(facts_of_artifact(home, manifest))
    uncalibrated = facts_of_artifact(home, manifest, schedule=(R, F, R, F))
    assert "Calibration targets" not in printed(uncalibrated)
