"""What a plan is tied to: the checkpoint, the calls, and what is fixed in them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from diffusion import ddim_timesteps
from model import FashionDiT
from support.models import STEPS
from torch import Tensor, nn

from calicache.graph_passes.common.disk.hashing import digest, hash_weights
from calicache.graph_passes.common.errors import DependenceError, RecordError
from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.recording.grid import grid_of
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recorder import Recorder, record
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import flatten_call

TIMES = (9.0, 5.0, 1.0)
SHORT, LONG = torch.tensor([1, 1, 0]).bool(), torch.tensor([1, 1, 1]).bool()


class Plain(nn.Module):
    """Reads nothing off its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x) * mask + timestep[:, None]


class Reader(Plain):
    """Decides by how many values of the mask are true."""

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        return self.fc(x) * int(mask.sum()) + timestep[:, None]


def recorded(model: nn.Module, *masks: Tensor, calls: int = 1) -> Recording:
    """One run for every mask, each step called so often."""
    with record(model) as recording, torch.no_grad():
        for mask in masks:
            for time in TIMES:
                for _ in range(calls):
                    model(torch.randn(2, 3), torch.full((2,), time), mask)
    return recording


def bound(model: nn.Module, *masks: Tensor, calls: int = 1) -> Binding:
    return bind(model, recorded(model, *masks, calls=calls))


class Listed(nn.Module):
    """Takes a list, as Z-Image does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: list[Tensor], timestep: Tensor) -> Tensor:
        return torch.stack([self.fc(one) for one in x]) + timestep[:, None]


def test_tensors_of_a_list_keep_their_own_class_at_other_sizes() -> None:
    model, still = Listed(), torch.randn(3)
    with record(model) as recording, torch.no_grad():
        for time in TIMES:
            model([torch.randn(3), still], torch.full((2,), time))
    binding = bind(model, recording)
    assert (binding.dependence["x.0"], binding.dependence["x.1"]) == (
        Dependence.LATENT,
        Dependence.RUN,
    )
    for count in (1, 3):
        call = flatten_call(model, ([torch.randn(3)] * count, torch.ones(2)), {})
        classes = binding.classes_of(call.signature())
        wanted = [Dependence.LATENT, Dependence.RUN, Dependence.LATENT][:count]
        # The third was not recorded: it may change as often as any of them.
        assert [classes[f"x.{place}"] for place in range(count)] == wanted


def test_it_holds_what_the_recording_showed(dit: FashionDiT, dit_recording: Recording) -> None:
    binding = bind(dit, dit_recording)
    assert binding == Binding(
        signature=dit_recording.signature,
        dependence={
            "hidden_states": Dependence.LATENT,
            "timestep": Dependence.STEP,
            "class_labels": Dependence.RUN,
        },
        timestep=dit_recording.timestep,
        weights_hash=hash_weights(dit),
        reads="[]",
        run_values={},
        grid=grid_of(dit_recording),
    )
    assert binding.grid.timesteps == tuple(map(float, ddim_timesteps(STEPS)))
    assert binding.calls == 1
    assert bind(dit, dit_recording) == binding


def test_another_checkpoint_is_another_binding(dit: FashionDiT, dit_recording: Recording) -> None:
    other = copy.deepcopy(dit)
    other.blocks[0].mlp.fc1.bias[0] += 1e-3
    one, two = bind(dit, dit_recording), bind(other, dit_recording)
    assert one != two
    assert replace(two, weights_hash=one.weights_hash) == one


def test_values_of_a_run_are_kept_where_something_is_read() -> None:
    binding = bound(Reader(), SHORT, SHORT)
    assert binding.reads == "[2]"
    assert binding.run_values == {"mask": (digest(SHORT),)}  # once, though two runs have it


def test_values_of_several_runs_that_read_the_same_are_all_kept() -> None:
    turned = SHORT.flip(0)
    assert bound(Reader(), SHORT, turned).run_values == {"mask": (digest(SHORT), digest(turned))}


def test_nothing_is_kept_where_runs_read_different_values() -> None:
    binding = bound(Reader(), SHORT, LONG)
    assert (binding.reads, binding.run_values) == ("null", {})


def test_nothing_is_kept_where_nothing_is_read() -> None:
    binding = bound(Plain(), SHORT, LONG)
    assert (binding.reads, binding.run_values) == ("[]", {})


def test_a_model_without_weights_is_not_run() -> None:
    model = Reader()
    recording = recorded(model, SHORT)
    assert bind(model.to("meta"), recording).reads == "[]"


# --- other forms of call -------------------------------------------------------------------------


def test_another_signature_changes_nothing_else() -> None:
    binding = bound(Plain(), SHORT)
    first, *rest = binding.signature.tensors
    signature = replace(binding.signature, tensors=(replace(first, shape=(4, 3)), *rest))
    changed = binding.with_signature(signature)
    assert changed.signature is signature
    assert replace(changed, signature=binding.signature) == binding


def test_one_call_a_step_is_the_binding_itself() -> None:
    binding = bound(Plain(), SHORT)
    assert binding.by_step() is binding
    untimed = replace(binding, timestep=None)
    assert (untimed.calls, untimed.by_step() is untimed) == (1, True)


@pytest.mark.parametrize("calls", [2, 3])
def test_all_calls_of_a_step_in_one_have_the_form_of_the_merged_recording(calls: int) -> None:
    model = Plain()
    recording = recorded(model, SHORT, calls=calls)
    binding, whole = bind(model, recording), recording.by_step()
    assert binding.calls == calls
    merged = binding.by_step()
    assert merged.signature == whole.signature
    shapes = {spec.name: spec.shape for spec in merged.signature.tensors}
    assert shapes == {"x": (2 * calls, 3), "timestep": (2 * calls,), "mask": (3,)}
    assert (merged.calls, merged.by_step() is merged) == (1, True)
    back = replace(merged, signature=binding.signature, timestep=binding.timestep)
    assert back == binding


# --- what cannot be bound ------------------------------------------------------------------------


def test_an_empty_recording_is_refused() -> None:
    with pytest.raises(RecordError, match="expected at least one call of the model, got none"):
        bind(Plain(), Recorder())


def test_a_single_step_is_refused() -> None:
    model = Plain()
    with record(model) as recording:
        model(torch.randn(2, 3), torch.full((2,), 9.0), SHORT)
    with pytest.raises(DependenceError, match="expected a run of at least 2 steps, got 1 step"):
        bind(model, recording)
