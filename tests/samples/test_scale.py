"""samples/scale: the page says what its JSON says, and the models are what they are called."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from scale_measure import CASES, OBSERVE, SEARCH, Case, said, took
from scale_models import flux, short_flux, short_wan, wan
from scale_report import DOCS, FILE, NOTES, PAGE, write_page

from calicache.tools.bench.models import find_model

TINY = f"{Path(__file__).parents[1] / 'support' / 'small' / 'bench.py'}:tiny"


def test_the_page_is_written_from_the_json(tmp_path: Path) -> None:
    shutil.copy(DOCS / NOTES, tmp_path)
    write_page(json.loads((DOCS / FILE).read_text()), tmp_path)
    assert (tmp_path / PAGE).read_text() == (DOCS / PAGE).read_text()


def test_what_was_measured_was_as_it_is_told() -> None:
    results = json.loads((DOCS / FILE).read_text())
    known = {(find_model(case.model).name, work) for case in CASES for work in case.works}
    assert {(row["model"], row["work"]) for row in results["rows"]} <= known
    assert set(results["large"]) == {"dit-xl", "flux", "wan"}
    # The published sizes: 675 million without the embedders that diffusers makes for every block.
    sizes = {name: scale["parameters"] / 1e9 for name, scale in results["large"].items()}
    assert sizes["flux"] == pytest.approx(11.9, rel=0.01)
    assert sizes["wan"] == pytest.approx(14.3, rel=0.01)


def test_short_versions_have_the_true_width() -> None:
    assert (short_flux().width, short_wan().width) == (flux().width, wan().width) == (3072, 5120)


@pytest.mark.slow
def test_a_case_is_measured_and_counted() -> None:
    case = Case(TINY, 8, (OBSERVE, SEARCH), steps=6)
    counted = said(case)
    assert counted[SEARCH]["calls"] > counted[OBSERVE]["calls"] > 5
    measured = took(case, OBSERVE)
    assert measured["peak_bytes"] >= counted[OBSERVE]["weight_bytes"]
    assert measured["calls"] > 1
    assert measured["seconds"] == pytest.approx(measured["calls"] * measured["call_seconds"])
