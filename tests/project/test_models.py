"""Transformers of diffusers, a dozen of every kind; docs/models.md has all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from zoo.finding import FULL_RANK_BOUND, Finding, take
from zoo.other_sizes import entry_with, try_sizes
from zoo.report import ENTRIES, FAMILIES, read_report, totals, totals_line, write_report

DOCS = Path(__file__).resolve().parents[2] / "docs"

MODELS = (
    "DiTTransformer2DModel",  # the paper's: adaLN-Zero, class labels
    "PixArtTransformer2DModel",  # cross-attention to text with a mask, one shared adaLN
    "SD3Transformer2DModel",  # joint attention: two streams, each with residual branches
    "FluxTransformer2DModel",  # joint blocks, then single blocks with attention beside the MLP
    "ChromaTransformer2DModel",  # Flux with a modulation that is a model of its own
    "SanaTransformer2DModel",  # linear attention, convolutions in the feed-forward
    "QwenImageTransformer2DModel",  # joint attention, complex rotary tables, text lengths
    "CogView4Transformer2DModel",  # one attention over text and image, cut apart again
    "WanTransformer3DModel",  # video, patches by a 3-D convolution, fp32 modulation
    "HunyuanVideoTransformer3DModel",  # a token refiner for the text, masks made from lengths
    "LTXVideoTransformer3DModel",  # positions of tokens computed from frames and sizes
    "CogVideoXTransformer3DModel",  # 2-D and 3-D patches beside text in one sequence
    "StableAudioDiTModel",  # one dimension, global tokens before the sequence, GQA
)
# Exporting is most of the time: what each of them needs of the lowerings is in their own tests too,
# Flux as a pipeline in tests/graph_passes/recording/test_step_calls.py.
EXPORTED = (
    "DiTTransformer2DModel",
    "SanaTransformer2DModel",
    "QwenImageTransformer2DModel",
    "HunyuanVideoTransformer3DModel",
)


@pytest.fixture(scope="module", params=MODELS)
def finding(request: pytest.FixtureRequest) -> Finding:
    name = request.param
    return take(ENTRIES[name], onnx=name in EXPORTED, sampler=name == EXPORTED[0])


@pytest.fixture(scope="module")
def published() -> dict[str, Finding]:
    return read_report(DOCS / "models.json")


@pytest.mark.slow
def test_optimised_at_full_rank_equals_the_original_over_a_run(finding: Finding) -> None:
    # float32 rounding, multiplied by the layers of a few blocks and by the run: 1e-6.
    assert finding.full_rank.passed, finding.full_rank
    # At rank 0 it does not: equality is no matter of sites that do nothing.
    assert finding.stale is not None
    assert finding.stale > 10 * FULL_RANK_BOUND


@pytest.mark.slow
def test_sites_and_rejections_are_the_published_ones(
    finding: Finding, published: dict[str, Finding]
) -> None:
    assert finding.sites is not None, finding.full_rank.reason
    assert finding.linears is not None
    assert finding.coverage is not None
    assert sum(finding.rejections.values()) == finding.linears - finding.sites
    # What embeds and unembeds even a tiny model is less than a tenth of it.
    assert finding.coverage > 0.9
    report = published[finding.name]
    assert (finding.sites, finding.linears) == (report.sites, report.linears)
    assert finding.rejections == report.rejections


@pytest.mark.slow
@pytest.mark.parametrize("finding", EXPORTED, indirect=True)
def test_onnx_runtime_agrees_with_the_optimised_model_over_a_run(finding: Finding) -> None:
    assert finding.onnx.passed, finding.onnx


@pytest.mark.slow
@pytest.mark.parametrize("finding", EXPORTED[:1], indirect=True)
def test_whole_sampling_run_in_one_model_agrees(finding: Finding) -> None:
    assert finding.sampler.passed, finding.sampler


def test_no_model_is_named_in_the_compiler_or_the_export() -> None:
    root = DOCS.parent
    code = [
        path for folder in ("graph_passes", "export") for path in root.glob(f"{folder}/**/*.py")
    ]
    assert len(code) > 40
    classes = {entry.class_name for entry in ENTRIES.values()}
    named = [(path.name, c) for path in code for c in classes if c in path.read_text()]
    assert named == []


def test_report_lists_every_model_and_counts_right(published: dict[str, Finding]) -> None:
    text = (DOCS / "models.md").read_text()
    written = json.loads((DOCS / "models.json").read_text())
    assert list(published) == list(ENTRIES)
    assert written["totals"] == totals(published.values())
    assert totals_line(written["totals"]) in text
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] != "model"]
    assert [row[0] for row in rows] == list(ENTRIES)
    for name, column in (("full_rank", 3), ("onnx", 4), ("sampler", 5)):
        numbers = [row for row in rows if re.match(r"\d", row[column])]
        assert len(numbers) == written["totals"][name], name


def test_no_other_size_is_wrong_in_silence(published: dict[str, Finding]) -> None:
    tried = {name: finding.others for name, finding in published.items() if finding.others}
    assert len(tried) > 10
    assert {size for others in tried.values() for size in others} == {"batch", "prompt", "height"}
    wrong = [
        (name, size, check)
        for name, others in tried.items()
        for size, check in others.items()
        if not check.explained
    ]
    assert wrong == []


@pytest.mark.slow
def test_calls_of_other_sizes_are_exact() -> None:
    checks = try_sizes(ENTRIES["ZImageTransformer2DModel"])  # lists of images and of texts
    assert [size for size, check in checks.items() if check.passed] == ["batch", "prompt", "height"]


def test_tables_can_be_read_with_other_sizes() -> None:
    name = "FluxTransformer2DModel"
    entry, larger = ENTRIES[name], entry_with(name, {"TEXT": 9, "HEIGHT": 8})
    assert larger.inputs(3)["encoder_hidden_states"].shape[:2] == (3, 9)
    assert len(larger.inputs(3)["img_ids"]) == 2 * len(entry.inputs(2)["img_ids"])
    assert entry_with(name, {}).inputs(2)["txt_ids"].shape == entry.inputs(2)["txt_ids"].shape


def test_every_entry_has_a_name_of_its_own() -> None:
    assert len(ENTRIES) == sum(len(entries) for entries in FAMILIES.values())
    assert set(EXPORTED) <= set(MODELS) <= set(ENTRIES)


def test_report_comes_back_as_it_was_written(published: dict[str, Finding], tmp_path: Path) -> None:
    write_report(published.values(), tmp_path / "models.md")
    assert read_report(tmp_path / "models.json") == published
