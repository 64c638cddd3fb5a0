"""What was made of a model is made once for every form, and goes where the model goes."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.models import shake
from torch import Tensor, nn

from calicache.graph_passes import Plan, Recording, record
from calicache.graph_passes.recording.binding import Binding, bind
from calicache.graph_passes.rewriting.workspace import Workspace

pytestmark = pytest.mark.usefixtures("own_captures")


class Block(nn.Module):
    """One residual branch of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.tanh(self.fc1(x)))


def recorded(model: nn.Module) -> Recording:
    with record(model) as recording:
        for _ in range(3):
            model(torch.randn(2, 5, 8))
    return recording


@pytest.fixture
def model() -> nn.Module:
    return shake(Block())


@pytest.fixture
def recording(model: nn.Module) -> Recording:
    return recorded(model)


@pytest.fixture
def binding(model: nn.Module, recording: Recording) -> Binding:
    return bind(model, recording)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What was captured, in order."""
    modules: list[nn.Module] = []
    export = torch.export.export

    def counted(module: nn.Module, *args: object, **kwargs: object) -> object:
        modules.append(module)
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return modules


def other_batch(binding: Binding) -> Binding:
    (spec,) = binding.signature.tensors
    changed = (replace(spec, shape=(4, *spec.shape[1:])),)
    return binding.with_signature(replace(binding.signature, tensors=changed))


def test_a_model_is_captured_once_for_a_binding(
    model: nn.Module, recording: Recording, binding: Binding, captures: list[nn.Module]
) -> None:
    workspace = Workspace()
    analysis = workspace.analysis(model, binding)
    assert workspace.analysis(model, binding, ["*"], []) is analysis
    assert workspace.analysis(model, bind(model, recording)) is analysis  # equal, another object
    assert len(captures) == 1
    assert (analysis.binding, analysis.include, analysis.exclude) == (binding, ("*",), ())


def test_every_form_of_call_is_captured_once(
    model: nn.Module, binding: Binding, captures: list[nn.Module]
) -> None:
    workspace, other = Workspace(), other_batch(binding)
    first = [workspace.analysis(model, form) for form in (binding, other)]
    again = [workspace.analysis(model, form) for form in (binding, other)]
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert len(captures) == 2
    assert [site.tokens for site in first[0].sites.linears] == [10, 10]
    assert [site.tokens for site in first[1].sites.linears] == [20, 20]


def test_other_patterns_are_another_analysis(
    model: nn.Module, binding: Binding, captures: list[nn.Module]
) -> None:
    workspace = Workspace()
    options = [(("*",), ()), (("fc1",), ()), (("*",), ("fc1",))]
    analyses = [workspace.analysis(model, binding, *patterns) for patterns in options]
    names = [[site.name for site in analysis.sites.linears] for analysis in analyses]
    assert names == [["fc1", "fc2"], ["fc1"], ["fc2"]]
    again = [workspace.analysis(model, binding, *patterns) for patterns in options]
    assert all(a is b for a, b in zip(analyses, again, strict=True))
    assert len(captures) == 3


def test_another_model_with_the_same_weights_is_captured_for_itself(
    model: nn.Module, binding: Binding, captures: list[nn.Module]
) -> None:
    workspace, twin = Workspace(), copy.deepcopy(model)
    one, other = workspace.analysis(model, binding), workspace.analysis(twin, binding)
    assert one is not other
    assert len(captures) == 2
    weights = [analysis.captured.attribute("fc1.weight") for analysis in (one, other)]
    assert weights[0].data_ptr() == model.fc1.weight.data_ptr()
    assert weights[1].data_ptr() == twin.fc1.weight.data_ptr()


def test_a_model_that_was_moved_is_captured_where_it_is(
    model: nn.Module, binding: Binding, captures: list[nn.Module]
) -> None:
    workspace = Workspace()
    here = workspace.analysis(model, binding)
    model.to("meta")
    moved = workspace.analysis(model, binding)
    assert [a.captured.device.type for a in (here, moved)] == ["cpu", "meta"]
    assert workspace.analysis(model, binding) is moved
    assert len(captures) == 2


def test_a_model_in_another_dtype_is_captured_again(
    model: nn.Module, binding: Binding, captures: list[nn.Module]
) -> None:
    workspace = Workspace()
    single = workspace.analysis(model, binding)
    model.double()
    double = bind(model, recorded_in(model, torch.float64))
    assert workspace.analysis(model, double) is not single
    assert len(captures) == 2


def recorded_in(model: nn.Module, dtype: torch.dtype) -> Recording:
    with record(model) as recording:
        for _ in range(3):
            model(torch.randn(2, 5, 8, dtype=dtype))
    return recording


def test_entries_go_with_their_model(model: nn.Module, binding: Binding) -> None:
    workspace, twin = Workspace(), copy.deepcopy(model)
    for one in (model, twin):
        workspace.analysis(one, binding)
    assert len(workspace._analyses) == 2
    del twin, one
    gc.collect()
    assert list(workspace._analyses) == [model]


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))],
    ids=["copy", "deep copy", "pickle"],
)
def test_copies_begin_empty(
    model: nn.Module,
    recording: Recording,
    captures: list[nn.Module],
    copied: Callable[[Workspace], Workspace],
) -> None:
    plan = Plan.from_trajectory(model, recording, rank=2, weighting="none", order=0)
    full = plan.workspace
    for target in plan.workspace.analysis(model, plan.binding).sites.linears:
        assert target.name in ("fc1", "fc2")
    assert len(captures) == 1
    empty = copied(full)
    assert type(empty) is Workspace
    assert (len(empty._analyses), empty.decompositions.count) == (0, 0)
    assert len(full._analyses) == 1  # the first is left as it was
    assert empty.analysis(model, plan.binding) is not full.analysis(model, plan.binding)
    assert len(captures) == 2


def test_a_changed_plan_goes_on_with_the_workspace_and_a_copied_one_does_not(
    model: nn.Module, recording: Recording
) -> None:
    plan = Plan.from_trajectory(model, recording, rank=2, correct=False)
    assert plan.with_rank(4).workspace is plan.workspace
    assert plan.with_schedule("RC").workspace is plan.workspace
    assert copy.deepcopy(plan).workspace is not plan.workspace
    # It is no part of a plan's value.
    fields = ("binding", "recipe", "front")
    twin = copy.deepcopy(plan)
    assert all(getattr(twin, name) == getattr(plan, name) for name in fields)
    assert "workspace" not in repr(plan)
