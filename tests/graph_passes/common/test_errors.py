"""The errors: every message tells stage, place, what was expected, what was there, the mend."""

from __future__ import annotations

import pickle

import pytest

from calicache.graph_passes.common import errors
from calicache.graph_passes.common.errors import CalicacheError, NoSampler

KINDS = sorted(CalicacheError.__subclasses__(), key=lambda kind: kind.__name__)
OPEN_KINDS = [kind for kind in KINDS if kind is not NoSampler]  # whose parts the raiser chooses


@pytest.mark.parametrize("kind", OPEN_KINDS)
def test_message_holds_stage_place_expected_got_and_fix(kind: type[CalicacheError]) -> None:
    error = kind("the place", expected="one thing", got="another", fix="Do this.")
    assert str(error) == f"{kind.stage}: the place: expected one thing, got another. Do this."


@pytest.mark.parametrize("kind", OPEN_KINDS)
def test_parts_can_be_read_one_by_one(kind: type[CalicacheError]) -> None:
    error = kind("the place", expected="one thing", got="another", fix="Do this.")
    parts = (error.where, error.expected, error.got, error.fix)
    assert parts == ("the place", "one thing", "another", "Do this.")


def test_every_kind_has_a_stage_of_its_own() -> None:
    stages = [kind.stage for kind in KINDS]
    assert len(set(stages)) == len(stages)
    assert CalicacheError.stage not in stages


def test_module_defines_nothing_but_calicache_errors() -> None:
    raised = [
        value
        for value in vars(errors).values()
        if isinstance(value, type)
        and issubclass(value, Exception)
        and not issubclass(value, Warning)
    ]
    assert len(raised) == len(KINDS) + 1
    assert all(issubclass(kind, CalicacheError) for kind in raised)


def test_missing_sampler_tells_its_reason_as_what_it_got() -> None:
    error = NoSampler("the latents are noise")
    assert str(error) == (
        "sampler: recording: expected a sampler whose latents are fixed weighted sums of what came "
        "before, got the latents are noise. Record whole runs of such a sampler (DDIM without "
        "clip_sample, Euler, flow matching, DPM-Solver++ 2M)."
    )
    assert error.reason == error.got == "the latents are noise"


@pytest.mark.parametrize(
    "error",
    [
        errors.RunError("the place", expected="one thing", got="another", fix="Do this."),
        NoSampler("the latents are noise"),
    ],
)
def test_error_survives_the_way_out_of_a_worker_process(error: CalicacheError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.where, copy.fix) == (str(error), error.where, error.fix)
