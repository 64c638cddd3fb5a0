"""Modes and rules, as users write them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from calicache.graph_passes import Granularity, SiteMode, SiteRule, StepMode
from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.settings.choices import STEP_LETTERS

CHOICES = "REFRESH | CALIBRATE | REUSE | FORECAST | R | C | U | F"


@pytest.mark.parametrize("mode", StepMode)
def test_a_mode_has_a_name_and_a_letter_in_any_case(mode: StepMode) -> None:
    letter = STEP_LETTERS[mode]
    names = (mode.name, mode.name.lower(), mode.name.title(), letter, letter.lower())
    for name in names:
        assert StepMode.of(name) is mode
    assert StepMode.of(mode) is mode


def test_every_mode_has_a_letter_of_its_own() -> None:
    assert dict(zip(StepMode, "RCUF", strict=True)) == STEP_LETTERS


@pytest.mark.parametrize("name", ["", "X", "RC", " R", "refreshing", 0, 1, True, None, ["R"]])
def test_anything_else_is_refused_with_the_choices(name: Any) -> None:
    with pytest.raises(PlanError) as caught:
        StepMode.of(name)
    assert str(caught.value) == (
        f"plan: step mode: expected {CHOICES}, got {name!r}. Choose one of these."
    )


@pytest.mark.parametrize("mode", SiteMode)
@pytest.mark.parametrize("granularity", [None, *Granularity])
def test_strings_in_a_rule_are_members(mode: SiteMode, granularity: Granularity | None) -> None:
    written = None if granularity is None else granularity.value
    rule = SiteRule("blocks.*", mode.value, 4, written)
    assert rule == SiteRule("blocks.*", mode, 4, granularity)
    assert rule.mode is mode
    assert rule.granularity is granularity


def test_a_rule_leaves_rank_and_granularity_to_the_plan() -> None:
    rule = SiteRule("*.attn", "reuse")
    assert (rule.rank, rule.granularity) == (None, None)
    with pytest.raises(FrozenInstanceError):
        rule.mode = SiteMode.FULL  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mode", "granularity", "message"),
    [
        ("skip", None, "plan: sitemode: expected calibrate | reuse | full, got 'skip'."),
        ("FULL", None, "plan: sitemode: expected calibrate | reuse | full, got 'FULL'."),
        ("full", "head", "plan: granularity: expected linear | branch, got 'head'."),
    ],
)
def test_unknown_words_in_a_rule_are_refused(
    mode: str, granularity: str | None, message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        SiteRule("*", mode, granularity=granularity)
    assert str(caught.value) == f"{message} Choose one of these."
