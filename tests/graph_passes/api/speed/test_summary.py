"""The promise in a few lines, of fields alone."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from torch import nn

from calicache.graph_passes import PartSummary, Rejection, Summary
from calicache.graph_passes.settings.front import ErrorSummary
from calicache.graph_passes.settings.latency import BranchChoice

PART = PartSummary(
    name="transformer",
    steps="12 REFRESH + 23 FORECAST",
    macs=0.34,
    seconds=0.375,
    error=ErrorSummary.of([0.004, 0.006]),
    fallback="",
    slower={BranchChoice.LINEAR: 1.25},
    rejections=(Rejection("head", "linear_9", "after the last branch"),) * 3,
)
SUMMARY = Summary(
    parts=(PART,),
    plain_seconds=42.0,
    fast_seconds=16.0,
    error=0.005,
    runtime="PyTorch on a machine",
    left="",
    searched=True,
    folder=Path("somewhere"),
    models={"transformer": nn.Identity()},
)


def test_the_text_has_every_figure() -> None:
    text = str(SUMMARY)
    for figure in (
        *("2.62 times as fast", "16 s a run", "42 s before", "0.34 of the MACs"),
        *("0.38 of the time", "0.005, 0.006 at worst of 2", "linear (1.25)", "head", "2 more"),
        *("PyTorch on a machine", "searched for now", "somewhere", "12 REFRESH + 23 FORECAST"),
    ):
        assert figure in text
    assert repr(SUMMARY) == text


def test_two_parts_are_no_more_than_a_dozen_lines() -> None:
    two = replace(SUMMARY, parts=(PART, replace(PART, name="transformer_2")))
    assert len(str(two).splitlines()) <= 12
    assert len(str(SUMMARY).splitlines()) <= 8


def test_a_fallback_and_what_was_left_are_told_with_their_reasons() -> None:
    part = replace(PART, error=None, seconds=None, fallback="sampler: it adds noise. Use another.")
    assert "not searched: sampler: it adds noise\n" in str(replace(SUMMARY, parts=(part,)))
    left = replace(SUMMARY, left="the plan takes 1.25 of the time here")
    assert str(left).startswith("left as it was: the plan takes 1.25 of the time here")
    assert (left.speedup, SUMMARY.speedup) == (1.0, 42.0 / 16.0)


def test_it_is_a_value() -> None:
    assert replace(SUMMARY) == SUMMARY
    assert SUMMARY.model is SUMMARY.models["transformer"]
    with pytest.raises(FrozenInstanceError):
        SUMMARY.left = "changed"  # type: ignore[misc]
