"""The artifact folder: a manifest that tells the truth, and files that are checked against it."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.artifacts import kept_refreshes
from torch import Tensor, nn

from calicache.export import Manifest, Session, export_onnx, load_artifact, read_manifest
from calicache.graph_passes import (
    Granularity,
    OptimizedModel,
    Plan,
    SiteMode,
    SiteRule,
    StepMode,
    optimize,
    record,
)
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.errors import ArtifactError, ExportError

pytestmark = pytest.mark.slow

R, C, U, FORECAST = StepMode
FILES = ["graphs.json.gz", "manifest.json", "model.onnx", "weights.bin"]
LISTED = [name for name in FILES if name != "manifest.json"]


@torch.library.custom_op("calicache_test::thrice", mutates_args=())
def thrice(x: Tensor) -> Tensor:
    return x * 3


@thrice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Residual(nn.Module):
    """One residual branch on (2, 5, 16); `op` comes last."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.op = nn.Linear(16, 32), nn.Linear(32, 16), op

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.op(x + self.fc2(F.gelu(self.fc1(x * timestep[:, None, None]))))


def compiled(op: Callable[[Tensor], Tensor]) -> OptimizedModel:
    model = Residual(op).eval().requires_grad_(False)
    with record(model) as recording:
        for step in range(3):
            model(torch.randn(2, 5, 16), torch.full((2,), 1 - 0.1 * step))
    plan = Plan.from_trajectory(model, recording, rank=2, order=0, correct=False)
    return optimize(model, plan)


@pytest.fixture(scope="module")
def fast(dit, dit_recording) -> OptimizedModel:
    """All four modes, order 2, output weights, one branch as a whole, one layer excluded."""
    plan = Plan.from_trajectory(
        dit,
        dit_recording,
        rank=4,
        schedule=(R, C, U, R, C, FORECAST),
        rules=[SiteRule("blocks.0.mlp", SiteMode.CALIBRATE, granularity=Granularity.BRANCH)],
        exclude=["blocks.1.mlp.fc2"],
    )
    return optimize(dit, plan)


@pytest.fixture(scope="module")
def tiny() -> OptimizedModel:
    return compiled(nn.Identity())


@pytest.fixture(scope="module")
def artifact(fast, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "dit.onnx.d"
    export_onnx(fast, folder)
    return folder


@pytest.fixture(scope="module")
def manifest(artifact) -> Manifest:
    return load_artifact(artifact)


@pytest.fixture
def damaged(artifact, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(artifact, tmp_path / "damaged.d"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content["sha256"] = sum_of(content)
    path.write_text(json.dumps(content))


def test_folder_holds_model_weights_graphs_and_manifest_and_no_pickle(artifact) -> None:
    assert names(artifact) == FILES
    starts = {name: (artifact / name).read_bytes()[:2] for name in FILES}
    # b"\x80" opens a pickle, b"PK" the zip that torch.save writes.
    assert not any(start[:1] == b"\x80" or start == b"PK" for start in starts.values())
    onnx.checker.check_model(artifact / "model.onnx", full_check=True)


def test_manifest_repeats_the_plan(fast, manifest) -> None:
    recipe, binding = fast.plan.recipe, fast.plan.binding
    assert (manifest.format, manifest.layout) == (12, "step")
    assert manifest.schedule == recipe.schedule
    assert all(isinstance(mode, StepMode) for mode in manifest.schedule)
    assert (manifest.rank, manifest.order) == (4, 2)
    assert (manifest.weighting, manifest.correction) == (recipe.weighting, recipe.correction)
    assert manifest.correction == "fitted to the recorded runs"
    assert manifest.weights_hash == binding.weights_hash
    assert manifest.inputs == binding.signature.tensors
    assert manifest.outputs == ("output",)


def test_manifest_macs_are_those_of_the_cost_model(fast, manifest) -> None:
    by_mode = [manifest.mode(mode).macs for mode in StepMode]
    assert by_mode == [fast.compiled.cost.modes[mode] for mode in StepMode]
    assert manifest.plain_macs == fast.compiled.cost.plain_macs
    assert by_mode[R] >= manifest.plain_macs > by_mode[C] > by_mode[U] > by_mode[FORECAST] == 0


def test_modes_are_those_of_the_schedule_with_the_kept_values_they_read(fast, manifest) -> None:
    assert [record.mode for record in manifest.modes] == sorted(set(manifest.schedule))
    variant_set = fast.compiled.variant_set
    for record_ in manifest.modes:
        reads = variant_set.variants[record_.mode].reads
        assert record_.reads == tuple(name for name in reads if name in variant_set.slots())
    # Only the output is forecast: nothing inside the model is read.
    assert len(manifest.mode(FORECAST).reads) == manifest.history == 3


def test_mode_outside_the_schedule_has_no_record(tiny, tmp_path) -> None:
    manifest = export_onnx(tiny, tmp_path / "d")
    assert {record.mode for record in manifest.modes} == {R, C}


def test_run_share_is_macs_of_the_whole_run_over_plain(manifest) -> None:
    refresh, calibrate, reuse, forecast = (manifest.mode(mode).macs for mode in StepMode)
    used = 2 * refresh + 2 * calibrate + reuse + forecast
    expected = used / (6 * manifest.plain_macs)
    # Both are one float division of the same integers, in another order.
    assert manifest.run_share == pytest.approx(expected, rel=1e-12)


def test_manifest_caches_are_those_of_the_rewritten_model(fast, manifest) -> None:
    caches = fast.compiled.variant_set.caches
    assert [(spec.name, spec.shape, spec.torch_dtype) for spec in manifest.caches] == [
        (cache.name, cache.shape, cache.dtype) for cache in caches
    ]
    assert manifest.history == fast.compiled.variant_set.history == 3
    assert manifest.cache_bytes == 3 * sum(cache.nbytes for cache in caches)


def test_cache_bytes_are_those_of_the_values_a_run_keeps(artifact, manifest, dit_recording):
    session = Session(artifact)
    for step, call in enumerate(dit_recording.calls):
        session.step(step, **call)
    sizes = {name: value.numpy().nbytes for name, value in kept_refreshes(session)[0].items()}
    assert sum(sizes.values()) * manifest.history == manifest.cache_bytes > 0
    kept = [name for caches in kept_refreshes(session) for name in caches]
    depths = session._run.kept[0].depths
    writers = [manifest.mode(mode).writes for mode in manifest.schedule]
    for name in sizes:
        written = sum(name in writes for writes in writers)
        assert kept.count(name) == min(written, depths[name])


def test_target_records_agree_with_targets_factors_and_costs(fast, manifest) -> None:
    assert len(manifest.targets) == len(fast.compiled.targets)
    for record_, target in zip(manifest.targets, fast.compiled.targets, strict=True):
        factors, cost = fast.compiled.factors[target.name], fast.compiled.cost.targets[target.name]
        assert (record_.name, record_.granularity) == (target.name, target.granularity)
        assert record_.sites == target.sites
        assert (record_.energy, record_.rank) == (factors.energy, factors.rank)
        assert record_.in_features == factors.down.shape[1]
        assert sum(record_.out_features) == factors.up.shape[0]
        assert record_.factor_bytes == factors.down.nbytes + factors.up.nbytes == cost.factor_bytes
        assert record_.full_bytes == cost.full_bytes
        assert (record_.full_macs, record_.calibrate_macs) == (cost.full_macs, cost.calibrate_macs)
        assert record_.cache_bytes == cost.cache_bytes
    names = {record_.name: record_ for record_ in manifest.targets}
    assert names["blocks.0.mlp"].granularity is Granularity.BRANCH
    assert names["blocks.0.attn.q+k+v"].out_features == (32, 32, 32)
    assert manifest.branches == tuple(
        branch.name for branch in fast.compiled.analysis.sites.branches
    )


def test_target_that_is_reused_has_no_energy_and_no_factors(dit, dit_recording, tmp_path) -> None:
    plan = Plan.from_trajectory(
        dit,
        dit_recording,
        rank=4,
        rules=[SiteRule("blocks.*.attn", SiteMode.REUSE)],
        correct=False,
    )
    manifest = export_onnx(optimize(dit, plan), tmp_path / "d")
    records = [record_ for record_ in manifest.targets if record_.name.endswith("attn")]
    assert [record_.name for record_ in records] == ["blocks.0.attn", "blocks.1.attn"]
    for record_ in records:
        assert (record_.rank, record_.energy, record_.factor_bytes) == (0, None, 0)


def test_manifest_lists_rejections_with_reasons(fast, manifest) -> None:
    assert manifest.rejections == fast.compiled.rejections
    reasons = {rejection.name: rejection.reason for rejection in manifest.rejections}
    assert "blocks.1.mlp.fc2" in reasons["blocks.1.mlp.fc2"]


def test_manifest_lists_every_other_file_with_size_and_digest(artifact, manifest) -> None:
    assert [file.name for file in manifest.files] == LISTED
    for file in manifest.files:
        assert file.size == (artifact / file.name).stat().st_size
        assert file.sha256 == sha256_of(artifact / file.name)


def test_folder_can_be_moved_to_a_path_with_spaces(artifact, dit_recording, tmp_path) -> None:
    expected = Session(artifact).step(0, **dit_recording.calls[0])
    copy = shutil.copytree(artifact, tmp_path / "first")
    moved = shutil.move(copy, tmp_path / "my models (1) é")
    assert np.array_equal(Session(moved).step(0, **dit_recording.calls[0]), expected)


def test_second_export_replaces_the_folder_with_the_same_bytes(tiny, tmp_path) -> None:
    folder = tmp_path / "my models" / "a b.d"  # the parent does not exist either
    first = export_onnx(tiny, str(folder))
    (folder / "model.onnx").write_text("damaged")
    assert export_onnx(tiny, folder) == first
    assert load_artifact(folder) == first
    assert names(folder.parent) == ["a b.d"]


@pytest.mark.parametrize("there", ["a folder with photo.jpg", "a file", "an artifact with a note"])
def test_an_export_replaces_nothing_but_an_artifact(there: str, tiny, damaged, tmp_path) -> None:
    target = damaged if there == "an artifact with a note" else tmp_path / "mine"
    if there == "a file":
        target.write_text("dear")
    else:
        target.mkdir(exist_ok=True)
        (target / "photo.jpg").write_text("dear")
    with pytest.raises(ExportError) as caught:
        export_onnx(tiny, target)
    got = "a file" if there == "a file" else "a folder with photo.jpg"
    assert str(caught.value) == (
        f"export: {target}: expected nothing, or an artifact: nothing else is replaced, got {got}. "
        "Choose another path, or delete what is there yourself."
    )
    assert (target if there == "a file" else target / "photo.jpg").read_text() == "dear"


def test_refused_op_leaves_the_old_folder_and_no_temporaries(damaged, manifest) -> None:
    with pytest.raises(ExportError):
        export_onnx(compiled(torch.ops.calicache_test.thrice), damaged)
    assert load_artifact(damaged) == manifest
    assert names(damaged.parent) == [damaged.name]


def test_full_disk_leaves_the_old_folder_and_no_temporaries(tiny, damaged, manifest) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # weights.bin fits
    try:
        with pytest.raises(ExportError, match=r"File too large\. .*before is unchanged"):
            export_onnx(tiny, damaged)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_artifact(damaged) == manifest
    assert names(damaged.parent) == [damaged.name]


@pytest.mark.parametrize("name", LISTED)
def test_truncated_file_is_refused_by_name(name: str, damaged) -> None:
    path = damaged / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{name}: expected \d+ bytes, got \d+ bytes"):
        Session(damaged)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_refused_by_name(name: str, damaged) -> None:
    (damaged / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        Session(damaged)


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(LISTED), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused_by_name(artifact, name: str, place: float, bit: int) -> None:
    folder = artifact.parent / "flipped.d"
    shutil.copytree(artifact, folder, dirs_exist_ok=True)
    raw = bytearray((folder / name).read_bytes())
    raw[int(place * len(raw))] ^= 1 << bit
    (folder / name).write_bytes(raw)
    with pytest.raises(ArtifactError, match=f"{name}: expected SHA-256"):
        load_artifact(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}"])
def test_damaged_manifest_is_refused(content: bytes, damaged) -> None:
    (damaged / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(damaged)


@settings(max_examples=12, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True))
def test_manifest_cut_short_anywhere_is_refused(artifact, place: float) -> None:
    folder = artifact.parent / "cut.d"
    folder.mkdir(exist_ok=True)
    raw = (artifact / "manifest.json").read_bytes().rstrip()
    (folder / "manifest.json").write_bytes(raw[: int(place * len(raw))])
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_manifest(folder)


@pytest.mark.parametrize("without", [(), ("caches", "files")])
def test_other_format_is_refused_with_both_numbers(without: tuple[str, ...], damaged) -> None:
    def change(content: dict[str, Any]) -> None:
        content["format"] = 1
        for name in without:  # another format may have other fields
            del content[name]

    edit_manifest(damaged, change)
    with pytest.raises(ArtifactError, match=r"manifest\.json.*format 1, this version reads 12"):
        load_artifact(damaged)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "sub/x", ".."])
def test_file_outside_the_folder_is_refused_even_if_it_exists(name: str, damaged) -> None:
    (damaged.parent / "x").write_bytes(b"")
    record = {"name": name, "size": 0, "sha256": sha256_of(damaged.parent / "x")}
    edit_manifest(damaged, lambda content: content["files"].append(record))
    with pytest.raises(ArtifactError, match=r"files\.3\.name: String should match pattern"):
        load_artifact(damaged)


def test_manifest_that_leaves_the_model_out_is_refused(damaged) -> None:
    edit_manifest(damaged, lambda content: content.update(files=[]))
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        Session(damaged)


# Every one with a right sum: what someone could write on purpose, or another tool by mistake.
CRAFTED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "weights not listed": (
        lambda c: c.update(files=[f for f in c["files"] if f["name"] != "weights.bin"]),
        "model.onnx refers to weights.bin, which is not listed",
    ),
    "a file twice": (lambda c: c["files"].append(c["files"][0]), "files that do not belong"),
    "a cache by another name": (
        lambda c: c["caches"][0].update(name="cache_other"),
        "reads that do not belong to the rest",
    ),
    "a cache of another size": (
        lambda c: c["caches"][0]["shape"].__setitem__(1, 5),
        "model.onnx takes ",
    ),
    "a cache of another dtype": (
        lambda c: c["caches"][0].update(dtype="float16"),
        "not as float16",
    ),
    "a dtype that is none": (lambda c: c["inputs"][0].update(dtype="os"), "a torch dtype name"),
    "an input by another name": (
        lambda c: c["inputs"][0].update(name="x"),
        "model.onnx takes hidden_states, which the manifest does not have",
    ),
    "an input of another shape": (
        lambda c: c["inputs"][0].update(shape=[1, 1, 28, 28]),
        "model.onnx takes hidden_states as float32 (4, 1, 28, 28), not as float32 (1, 1, 28, 28)",
    ),
    "another output": (lambda c: c.update(outputs=["x"]), "model.onnx gives other outputs"),
    "an unknown mode": (lambda c: c["schedule"].append(9), "schedule.6: Input should be 0, 1, 2"),
    "a first step that is not REFRESH": (lambda c: c["schedule"].insert(0, 1), "schedule that do"),
    "no steps": (lambda c: c.update(schedule=[]), "schedule that do not belong"),
    "a mode that has no record": (lambda c: c["modes"].pop(), "modes that do not belong"),
    "a mode twice": (lambda c: c["modes"].append(c["modes"][0]), "modes that do not belong"),
    "a history without end": (lambda c: c.update(history=10**9), "history that do not belong"),
    "a shorter history": (lambda c: c.update(history=1), "reads that do not belong"),
    "calls without end": (
        lambda c: c.update(calls_per_step=10**9),
        "calls_per_step: Input should be less than or equal to 64",
    ),
    "a negative history": (lambda c: c.update(history=-1), "history: Input should be greater"),
    "weights that overflow": (
        lambda c: c["output_weights"][0].__setitem__(0, 1e308),
        "output_weights that do not belong",
    ),
    "weights of another step": (lambda c: c["output_weights"].pop(), "output_weights that do"),
    "no work at all": (lambda c: c.update(plain_macs=0), "plain_macs that do not belong"),
    "a sampler": (lambda c: c.update(layout="sampler"), "sampler that do not belong"),
    "another layout": (lambda c: c.update(layout="pair"), "the manifest has no entry for"),
    "fixed values of nothing": (
        lambda c: c.update(fixed={"x": ["0" * 64]}),
        "fixed that do not belong",
    ),
    "a number as text": (lambda c: c.update(rank="4"), "rank: Input should be a valid integer"),
    "an endless size": (
        lambda c: c["caches"][0].update(shape=[2**60]),
        "caches.0.shape.0: Input should be less than or equal",
    ),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_manifest_that_contradicts_itself_or_the_model_is_refused(case: str, damaged) -> None:
    change, reason = CRAFTED[case]
    edit_manifest(damaged, change)
    with pytest.raises(ArtifactError) as caught:
        Session(damaged)
    assert reason in str(caught.value)
    assert str(damaged) in caught.value.where


@pytest.mark.parametrize("place", range(60))
def test_a_flipped_bit_of_the_manifest_is_refused_or_makes_no_difference(
    place: int, damaged, manifest
) -> None:
    path = damaged / "manifest.json"
    raw = bytearray(path.read_bytes())
    raw[len(raw) * place // 60] ^= 2
    path.write_bytes(raw)
    try:
        assert read_manifest(damaged) == manifest
    except ArtifactError as error:
        assert "manifest.json" in error.where  # noqa: PT017


def test_a_manifest_that_is_no_file_or_very_large_is_refused_at_once(damaged) -> None:
    path = damaged / "manifest.json"
    with path.open("r+b") as file:
        file.truncate(2**32)  # no room on the disk is taken
    with pytest.raises(ArtifactError, match=r"4294967296 bytes, more than the 16777216 of any"):
        read_manifest(damaged)
    path.write_text("[" * 10**6)
    with pytest.raises(ArtifactError, match="recursion limit exceeded"):
        read_manifest(damaged)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match=r"manifest\.json is no regular file"):
        read_manifest(damaged)


def link(folder: Path, blobs: Path, files: Sequence[str]) -> None:
    """Put files of a folder elsewhere, under their digests, and links in their place."""
    blobs.mkdir()
    for name in files:
        blob = blobs / sha256_of(folder / name)
        (folder / name).rename(blob)
        (folder / name).symlink_to(blob)


def test_a_folder_as_huggingface_hub_lays_it_out_works(artifact, damaged, dit_recording) -> None:
    expected = Session(artifact).step(0, **dit_recording.calls[0])
    link(damaged, damaged.parent / "blobs", FILES)
    assert np.array_equal(Session(damaged).step(0, **dit_recording.calls[0]), expected)


def test_weights_that_alone_are_a_link_are_told_what_to_do(damaged) -> None:
    link(damaged, damaged.parent / "blobs", ["weights.bin"])
    with pytest.raises(ArtifactError) as caught:
        Session(damaged)
    assert (
        "weights.bin is a link to a folder that model.onnx is not in, and ONNX Runtime follows "
        "none: copy what it leads to (cp -L), or link both to one folder, as huggingface_hub does"
    ) in str(caught.value)


@pytest.mark.parametrize("name", ["nothing here", "empty", "a file"])
def test_what_is_no_artifact_is_refused(name: str, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("{}")
    with pytest.raises(ArtifactError, match=rf"{name}.*expected a manifest written by export_onnx"):
        Session(tmp_path / name)


def test_unknown_layout_is_refused_with_the_valid_ones(fast, tmp_path) -> None:
    with pytest.raises(
        ExportError, match=r"layout: expected step \| pair \| sampler, got 'banana'"
    ):
        export_onnx(fast, tmp_path / "d", layout="banana")
    assert names(tmp_path) == []
