"""Recording a sampler's calls: what is kept, how it splits into runs, and the file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.models import STEPS, sample_dit
from torch import Tensor, nn

from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.errors import RecordError
from calicache.graph_passes.recording.recorder import Recorder, record
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.timestep import Timestep


class Denoiser(nn.Module):
    """Takes what real ones take; what it computes does not matter here."""

    def forward(
        self, x: Tensor, timestep: Any = None, labels: Any = None, cond: Any = None
    ) -> tuple[Any, ...]:
        return x, timestep, labels, cond


def recorded(*calls: dict[str, Any]) -> Recorder:
    model = Denoiser()
    with record(model) as recording:
        for call in calls:
            model(**call)
    return recording


def sampled(*runs: Sequence[float]) -> Recording:
    """One call for every timestep, the latent fresh in each."""
    return recorded(
        *({"x": torch.randn(2, 3), "timestep": torch.full((2,), float(t))} for r in runs for t in r)
    )


def lengths(recording: Recording) -> list[int]:
    return [len(run) for run in recording.runs]


# --- what is kept -----------------------------------------------------------------------------


def test_every_call_of_a_real_sampler_is_kept(dit_recording: Recording) -> None:
    assert len(dit_recording.calls) == dit_recording.steps == STEPS
    times = [int(call["timestep"][0]) for call in dit_recording.calls]
    assert times == [999, 799, 599, 400, 200, 0]
    assert dit_recording.timestep == Timestep("timestep", descends=True)
    assert set(dit_recording.calls[0]) == {"hidden_states", "timestep", "class_labels"}


def test_recording_changes_no_result(dit: nn.Module) -> None:
    plain = sample_dit(dit)
    with record(dit):
        watched = sample_dit(dit)
    # The same operations on the same values: bitwise.
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)


def test_changing_an_input_later_does_not_change_the_record() -> None:
    x = torch.zeros(2, 3)
    model = Denoiser()
    with record(model) as recording:
        for _ in range(3):
            model(x)
            x += 1
    assert [float(call["x"][0, 0]) for call in recording.calls] == [0.0, 1.0, 2.0]


def test_kept_values_are_detached_and_on_the_cpu() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    kept = recorded({"x": x * 2}).calls[0]["x"]
    assert not kept.requires_grad
    assert kept.grad_fn is None
    assert kept.device.type == "cpu"


def test_values_that_stay_the_same_are_kept_once() -> None:
    labels = torch.tensor([1, 2])
    recording = recorded(*({"x": torch.randn(2, 3), "labels": labels.clone()} for _ in range(3)))
    assert len({id(call["labels"]) for call in recording.calls}) == 1
    assert len({id(call["x"]) for call in recording.calls}) == 3


@pytest.mark.parametrize("error", [None, ZeroDivisionError()])
def test_hook_is_gone_and_calls_are_kept_after_the_block(error: Exception | None) -> None:
    model = Denoiser()
    with suppress(ZeroDivisionError), record(model) as recording:
        model(torch.zeros(1))
        if error:
            raise error
    model(torch.zeros(1))
    assert len(recording.calls) == 1
    assert not model._forward_pre_hooks


def test_a_diffusers_pipeline_is_recorded_through_its_own_sampler() -> None:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8}
    transformer = DiTTransformer2DModel(in_channels=4, out_channels=8, **sizes)
    vae = AutoencoderKL(
        block_out_channels=(4,), latent_channels=4, norm_num_groups=2, layers_per_block=1
    )
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    with record(pipe.transformer) as recording:
        images = pipe(class_labels=[1, 2], num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert [int(call["timestep"][0]) for call in recording.calls] == [750, 500, 250, 0]
    # Guidance doubles the batch; 1000 is the class that means none.
    assert recording.calls[0]["hidden_states"].shape == (4, 4, 8, 8)
    assert recording.calls[3]["class_labels"].tolist() == [1, 2, 1000, 1000]


# --- runs -------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    schedule=st.lists(st.integers(0, 5), min_size=2, max_size=6).filter(lambda s: len(set(s)) > 1),
    runs=st.integers(1, 3),
    descends=st.booleans(),
)
def test_runs_end_where_the_timestep_turns_back(
    schedule: list[int], runs: int, descends: bool
) -> None:
    recording = sampled(*[sorted(schedule, reverse=descends)] * runs)
    # Timesteps that all come n times, as [0, 0, 1, 1], are n calls of one step.
    counts = [schedule.count(value) for value in set(schedule)]
    calls = min(counts) if all(count % min(counts) == 0 for count in counts) else 1
    assert recording.timestep == Timestep("timestep", descends, calls=calls)
    assert lengths(recording) == [len(schedule) // calls] * runs * calls
    assert recording.steps == len(schedule) // calls


def test_runs_may_differ_in_length() -> None:
    recording = sampled([9, 5, 1], [9, 1], [9, 7, 5, 3])
    assert (lengths(recording), recording.steps) == ([3, 2, 4], 4)


def test_timestep_without_a_batch_is_seen() -> None:
    calls = ({"x": torch.randn(2, 3), "timestep": torch.tensor(t)} for t in (3, 2, 1, 3, 2, 1))
    assert lengths(recorded(*calls)) == [3, 3]


def test_labels_of_a_single_image_are_not_mistaken_for_the_timestep() -> None:
    class LabelsFirst(nn.Module):
        def forward(self, x: Tensor, labels: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
            return x, labels, timestep

    model = LabelsFirst()
    with record(model) as recording:
        for label in (3, 7):
            for t in (9, 5, 1):
                model(torch.randn(1, 3), torch.tensor([label]), torch.tensor([t]))
    assert recording.timestep == Timestep("timestep", descends=True)
    assert lengths(recording) == [3, 3]


def test_calls_without_a_timestep_are_one_run() -> None:
    recording = recorded(*({"x": torch.randn(2, 3)} for _ in range(3)))
    assert (recording.timestep, lengths(recording)) == (None, [3])


# --- what cannot be recorded ------------------------------------------------------------------


@pytest.mark.parametrize("read", ["signature", "timestep", "runs", "steps", "dependence"])
def test_nothing_recorded_is_an_error_that_tells_how_to_record(read: str) -> None:
    with pytest.raises(RecordError) as caught:
        getattr(recorded(), read)
    message = str(caught.value)
    assert "record: recording: expected at least one call of the model, got none." in message
    assert "with record(model) as recording:" in message


X = torch.zeros(2, 3)


FORM, MOVING = "Record calls of one form", "Pass it as a tensor"


@pytest.mark.parametrize(
    ("first", "second", "place", "got", "advice"),
    [
        ({"x": X}, {"x": torch.zeros(4, 3)}, "x", "float32 (4, 3)", FORM),
        ({"x": X}, {"x": X.half()}, "x", "float16 (2, 3)", FORM),
        ({"x": X, "timestep": 9}, {"x": X, "timestep": 5}, "timestep", "5", MOVING),
        ({"x": X, "cond": {"a": X}}, {"x": X, "cond": {"b": X}}, "cond.a", "None", FORM),
        ({"x": X, "labels": X}, {"x": X}, "labels", "None", FORM),
    ],
)
def test_calls_of_another_form_are_refused_with_advice(
    first: dict[str, Any], second: dict[str, Any], place: str, got: str, advice: str
) -> None:
    with pytest.raises(RecordError) as caught:
        recorded(first, second)
    assert str(caught.value).startswith(f"record: argument {place}: expected ")
    assert got in caught.value.got
    assert advice in caught.value.fix


def test_the_order_of_dict_keys_is_not_part_of_the_form() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    conditions = ({"a": a, "b": b}, {"b": b, "a": a})
    recording = recorded(*({"x": X, "cond": cond} for cond in conditions))
    assert [float(call["cond.b"]) for call in recording.calls] == [1.0, 1.0]


# --- the file --------------------------------------------------------------------------------


def test_file_gives_back_the_recording(dit_recording: Recording, tmp_path: Path) -> None:
    path = tmp_path / "my runs" / "a.safetensors"
    dit_recording.save(path)
    loaded = Recording.load(path)
    assert loaded.signature == dit_recording.signature
    assert (loaded.timestep, loaded.steps) == (dit_recording.timestep, dit_recording.steps)
    for got, expected in zip(loaded.calls, dit_recording.calls, strict=True):
        assert list(got) == list(expected)
        # Bytes on disk: bitwise.
        torch.testing.assert_close(dict(got), dict(expected), rtol=0, atol=0)


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), min_size=2, max_size=3),
    dtype=st.sampled_from(DTYPES),
    constant=st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    steps=st.integers(1, 3),
)
def test_file_round_trip_for_any_form(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    dtype: torch.dtype,
    constant: Any,
    steps: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    calls = [{"x": (9 * torch.rand(shape)).to(dtype).mT, "cond": [constant]} for _ in range(steps)]
    recording = recorded(*calls)
    recording.save(path)
    loaded = Recording.load(path)
    assert loaded.signature == recording.signature
    assert len(loaded.calls) == steps
    for got, call in zip(loaded.calls, calls, strict=True):
        assert torch.equal(got["x"], call["x"])


def test_infinite_numbers_survive_the_file(tmp_path: Path) -> None:
    recording = recorded({"x": X, "labels": float("inf"), "cond": float("-inf")})
    recording.save(tmp_path / "a")
    assert Recording.load(tmp_path / "a").signature == recording.signature


def test_values_shared_by_steps_are_stored_once(tmp_path: Path) -> None:
    text = torch.randn(64, 256)  # 64 KiB
    calls = ({"x": torch.randn(2, 3), "cond": text} for _ in range(10))
    recorded(*calls).save(tmp_path / "a")
    assert 65_536 < (tmp_path / "a").stat().st_size < 2 * 65_536
    loaded = Recording.load(tmp_path / "a")
    assert len({id(call["cond"]) for call in loaded.calls}) == 1


def test_nothing_is_written_where_nothing_was_recorded(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="at least one call"):
        Recorder().save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def saved(path: Path) -> Path:
    recorded({"x": X, "timestep": torch.zeros(2), "labels": X.long()}).save(path)
    return path


def parts(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return values, file.metadata()


def edit(path: Path, **changes: Any) -> Path:
    """Change what the head says, and mend its sum: what someone could write on purpose."""
    values, metadata = parts(path)
    content = json.loads(metadata["content"]) | changes
    content["sha256"] = sum_of(content)
    save_file(values, path, metadata | {"content": json.dumps(content)})
    return path


@pytest.mark.parametrize("kept", [0, 4, 60, -1])
def test_truncated_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = saved(tmp_path / "a")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(RecordError) as caught:
        Recording.load(path)
    assert str(caught.value).startswith(f"record: {path}: expected a recording written by")
    assert "Record again." in caught.value.fix


ROW = {"x": "value.0", "timestep": "value.1", "labels": "value.2"}


def form(dtype: str, tree: Any) -> dict[str, Any]:
    tensors = [{"name": "x", "shape": [2, 3], "dtype": dtype}]
    return {"tensors": tensors, "constants": [], "order": ["x"], "tree": tree}


TREE = {"kind": "dict", "keys": ["x"], "children": [None]}
EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "no table": ({"calls": "nonsense"}, "calls: Input should be a valid"),
    "a value that is not there": ({"calls": [ROW | {"x": "value.9"}]}, "KeyError: 'value.9'"),
    "another shape": ({"calls": [ROW | {"x": "value.1"}]}, "torch.float32 (2,)"),
    "another dtype": ({"calls": [ROW | {"x": "value.2"}]}, "torch.int64 (2, 3)"),
    "no arguments": ({"calls": [{}]}, "got nothing"),
    "too many arguments": ({"calls": [ROW | {"y": "value.1"}]}, "another argument: y"),
    "no calls": ({"calls": []}, "calls: Tuple should have at least 1 item"),
    "no signature": ({"signature": {}}, "signature.tensors: Field required"),
    "an unknown dtype": (
        {"signature": form("float99", TREE), "calls": [{"x": "value.0"}]},
        "got float99",
    ),
    "no tree": ({"signature": form("float32", "no tree")}, "signature.tree"),
    "a tree of nothing": (
        {"signature": form("float32", {"kind": "list", "keys": [], "children": []})},
        "the same arguments by name",
    ),
    "a dimension without end": (
        {"signature": form("float32", TREE) | {"tensors": [{"name": "x", "shape": [2**60]}]}},
        "signature.tensors.0.shape.0: Input should be less than or equal",
    ),
    "results of nothing": ({"results": ["nonsense"]}, "results.0"),
    "a result that is not there": ({"results": [1]}, "KeyError: 'result.1'"),
    "the format before": ({"format": 1}, "format 1, this version reads 2"),
    "of a plan": ({"kind": "calicache plan"}, "no JSON that is marked as calicache recording"),
}


@pytest.mark.parametrize("case", EDITS)
def test_crafted_file_is_refused_with_its_path_and_reason(tmp_path: Path, case: str) -> None:
    changes, reason = EDITS[case]
    path = edit(saved(tmp_path / "a"), **changes)
    with pytest.raises(RecordError, match=r"(?s)^record: .*: expected .*, got .*ecord again") as e:
        Recording.load(path)
    assert reason in str(e.value)
    assert str(path) in e.value.where


def test_a_tree_that_names_a_module_imports_nothing(tmp_path: Path) -> None:
    node = {"type": "collections.defaultdict", "context": '["wave", []]', "children_spec": []}
    path = edit(saved(tmp_path / "a"), signature=form("float32", json.dumps([1, node])))
    sys.modules.pop("wave", None)
    with pytest.raises(RecordError, match=r"signature\.tree"):
        Recording.load(path)
    assert "wave" not in sys.modules


def test_every_flipped_bit_is_refused_or_makes_no_difference(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    whole, before = path.read_bytes(), Recording.load(path)
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 300)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            loaded = Recording.load(path)
        except RecordError:
            refused += 1
            continue
        assert loaded.signature == before.signature
        assert all(
            torch.equal(value, call[name])
            for got, call in zip(loaded.calls, before.calls, strict=True)
            for name, value in got.items()
        )
    assert refused > 250  # all but spaces of the JSON


def test_a_dropped_tensor_or_call_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    values, metadata = parts(path)
    save_file({k: v for k, v in values.items() if k != "value.1"}, path, metadata)
    with pytest.raises(RecordError, match=r"other tensors than it was saved with: value\.1"):
        Recording.load(path)
    content = json.loads(metadata["content"])
    content["calls"] = content["calls"] * 2
    save_file(values, path, metadata | {"content": json.dumps(content)})
    with pytest.raises(RecordError, match="its SHA-256 is another"):
        Recording.load(path)


def test_missing_file_folder_and_foreign_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello, this is not a recording")
    save_file({"a": X}, tmp_path / "weights")
    for path in (tmp_path / "none", tmp_path, tmp_path / "text", tmp_path / "weights"):
        with pytest.raises(RecordError, match="expected a recording written by Recording"):
            Recording.load(path)


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(RecordError, match="is no regular file"):
            Recording.load(path)


def test_saving_replaces_a_recording_and_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path / "a")
    recorded({"x": X + 1}).save(path)
    assert torch.equal(Recording.load(path).calls[0]["x"], X + 1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"...")
    (tmp_path / "letter").write_text("dear")
    save_file({"a": X}, tmp_path / "weights")
    for name in ("photos", "letter", "weights"):
        with pytest.raises(RecordError, match="expected nothing, or a recording: nothing else is"):
            saved(tmp_path / name)
    assert (tmp_path / "photos" / "a.jpg").read_bytes() == b"..."
    assert (tmp_path / "letter").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "letter", "photos", "weights"]


# --- results ---------------------------------------------------------------------------------


def finished(*runs: tuple[Sequence[float], float | None]) -> Recorder:
    """Calls by timestep, and where a number is given a result full of it."""
    model = Denoiser()
    with record(model) as recording:
        for times, result in runs:
            for t in times:
                model(torch.randn(2, 3), torch.full((2,), float(t)))
            if result is not None:
                recording.finish(torch.full((2, 3), result))
    return recording


def results(recording: Recording) -> list[float | None]:
    return [None if end is None else float(end[0, 0]) for end in recording.ends]


@settings(max_examples=30, deadline=None)
@given(
    runs=st.lists(
        st.tuples(st.integers(2, 4), st.none() | st.integers(0, 9)), min_size=1, max_size=4
    )
)
def test_ends_are_aligned_with_runs(runs: list[tuple[int, int | None]]) -> None:
    recording = finished(*((range(count, 0, -1), result) for count, result in runs))
    assert lengths(recording) == [count for count, _ in runs]
    assert results(recording) == [result for _, result in runs]


def test_run_ends_at_finish_even_where_the_timestep_goes_on() -> None:
    recording = finished(([9, 8, 7], 1.0), ([6, 5], 2.0), ([4, 3], None))
    assert (lengths(recording), results(recording)) == ([3, 2, 2], [1.0, 2.0, None])
    assert lengths(sampled([9, 8, 7], [6, 5], [4, 3])) == [7]


def test_run_ends_at_finish_without_any_timestep() -> None:
    model = Denoiser()
    with record(model) as recording:
        for count in (2, 3):
            for _ in range(count):
                model(torch.randn(2, 3))
            recording.finish(torch.full((2, 3), float(count)))
    assert recording.timestep is None
    assert (lengths(recording), results(recording)) == ([2, 3], [2.0, 3.0])


def test_result_is_a_detached_copy_on_the_cpu() -> None:
    recording = finished(([2, 1], None))
    latents = torch.zeros(2, 3, requires_grad=True)
    recording.finish(latents * 1.0)
    (end,) = recording.ends
    assert end is not None
    assert (end.requires_grad, end.device.type) == (False, "cpu")
    given = torch.zeros(2, 3)
    again = finished(([2, 1], None))
    again.finish(given)
    given += 1
    assert results(again) == [0.0]


def test_results_survive_the_file(tmp_path: Path) -> None:
    recording = finished(([3, 2, 1], 7.0), ([3, 2, 1], None), ([3, 2], 9.0))
    recording.save(tmp_path / "a")
    loaded = Recording.load(tmp_path / "a")
    assert lengths(loaded) == [3, 3, 2]
    assert list(loaded.results) == [3, 8]
    for got, expected in zip(loaded.ends, recording.ends, strict=True):
        assert (got is None) == (expected is None)
        assert expected is None or torch.equal(got, expected)
    bare = finished(([2, 1], None))
    bare.save(tmp_path / "b")
    assert Recording.load(tmp_path / "b").ends == (None,)


@pytest.mark.parametrize("case", ["before any call", "twice"])
def test_finish_without_a_run_since_the_last_is_refused(case: str) -> None:
    recording = Recorder() if case == "before any call" else finished(([2, 1], 5.0))
    before = dict(recording.results)
    with pytest.raises(
        RecordError, match="finish: expected calls of the model before it, got none"
    ):
        recording.finish(torch.zeros(2, 3))
    assert recording.results == before
