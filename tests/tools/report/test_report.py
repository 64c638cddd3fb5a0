from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small.subjects import STEPS, small_model, small_runs
from torch import Tensor, nn
from typer.testing import CliRunner

from calicache.export import export_onnx
from calicache.graph_passes import Plan, Recording, StepMode, optimize
from calicache.graph_passes.common.errors import NoSampler, SubjectError
from calicache.graph_passes.settings.front import ErrorSummary, Front, FrontPoint
from calicache.tools.cli import app
from calicache.tools.compare.site_errors import LATENTS, OUTPUT, site_errors
from calicache.tools.report import page as report_page
from calicache.tools.report.data import MODEL, PLAN, RECORDING, SEARCHED, gather_report
from calicache.tools.report.page import render_report, write_report

pytestmark = pytest.mark.slow

R, C, U, F = StepMode
SCHEDULE = (R, C, F, R, U, C)
SECTIONS = ["summary", "tradeoff", "schedule", "errors", "steps", "energy", "cost", "operators"]
SECTIONS += ["belonging", "graphs", "more"]
MODEL_FILE = (
    "from support.small.subjects import small_model\n\ndef build():\n    return small_model()\n"
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return small_model()


@pytest.fixture(scope="module")
def runs(model: nn.Module) -> Recording:
    return small_runs(model, 2)


@pytest.fixture(scope="module")
def plan(model: nn.Module, runs: Recording) -> Plan:
    return Plan.from_trajectory(model, runs, schedule=SCHEDULE, rank=2, order=1)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, model: nn.Module, runs: Recording, plan: Plan
) -> Path:
    """A plan, an artifact, recorded runs and a model file, in a folder with a space."""
    place = tmp_path_factory.mktemp("of mine")
    runs.save(place / "runs.safetensors")
    searched = replace(plan, front=front_of(plan))
    searched.save(place / "plan")
    export_onnx(optimize(model, plan), place / "small.onnx.d")
    (place / "model.py").write_text(MODEL_FILE)
    return place


def front_of(plan: Plan) -> Front:
    weights, latent = plan.recipe.output_weights, plan.recipe.latent
    assert weights is not None
    assert latent is not None
    points = tuple(
        FrontPoint(cost, ErrorSummary.of([error, 2 * error]), SCHEDULE, 1, (), {}, weights)
        for cost, error in ((0.4, 0.02), (0.7, 0.01))
    )
    return Front("MACs", "budget 0.7", latent, points, 1, ErrorSummary.of([0.011, 0.013]))


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """The report of the artifact, with everything that there is."""
    arguments = [
        *("report", str(folder / "small.onnx.d"), "-o", str(folder / "report.html")),
        *("--recording", str(folder / "runs.safetensors"), "--plan", str(folder / "plan")),
        *("--model", f"{folder / 'model.py'}:build"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"Written: {folder / 'report.html'}\n"
    return folder / "report.html"


# Where the error comes from.


def run_beside(model: Callable[..., Tensor], other: Callable[..., Tensor]) -> list[float]:
    """Relative error of the latents before every step and after the last, over two runs."""
    draw = torch.Generator().manual_seed(3)
    off, size = [0.0] * (STEPS + 1), [0.0] * (STEPS + 1)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 5, 4, generator=draw)
            y = x
            for step in range(STEPS + 1):
                off[step] += float((y - x).double().square().sum())
                size[step] += float(x.double().square().sum())
                if step < STEPS:
                    time = torch.full((2,), 1 - step / STEPS)
                    x, y = x - 0.1 * model(x, time), y - 0.1 * other(y, time)
    return [(a / b) ** 0.5 for a, b in zip(off, size, strict=True)]


def test_site_errors_are_those_of_the_drop_in_model(
    model: nn.Module, runs: Recording, plan: Plan
) -> None:
    optimized = optimize(model, plan)
    errors = site_errors(optimized, runs)
    branches = tuple(branch.name for branch in optimized.compiled.analysis.sites.branches)
    assert errors.sites == (LATENTS, *branches, OUTPUT)
    assert errors.schedule == SCHEDULE
    expected = run_beside(model, optimized)
    # Both walk in float32 and add in another order; the errors themselves are about 1e-3.
    assert errors.errors[0] == pytest.approx(expected[:-1], rel=1e-3, abs=1e-7)
    assert errors.result == pytest.approx(expected[-1], rel=1e-3, abs=1e-7)


def test_first_step_is_exact_and_forecast_steps_have_gaps(
    model: nn.Module, runs: Recording, plan: Plan
) -> None:
    errors = site_errors(optimize(model, plan), runs)
    columns = list(zip(*errors.errors, strict=True))
    # Step 0 is the plain model on the recorded noise, but for rounding in the mix of outputs.
    assert columns[0] == pytest.approx([0.0] * len(errors.sites), abs=1e-6)
    inside = range(1, len(errors.sites) - 1)
    assert [columns[2][k] for k in inside] == [None] * len(inside)
    assert all(columns[1][k] is not None for k in inside)
    # CALIBRATE at rank 2 leaves something out, above rounding.
    assert max(float(columns[1][k] or 0.0) for k in inside) > 1e-5


def test_recording_of_another_length_is_refused(model: nn.Module, plan: Plan) -> None:
    longer = optimize(model, plan.with_schedule((*SCHEDULE, R)))
    with pytest.raises(NoSampler, match="no recorded run has the plan's 7 steps"):
        site_errors(longer, small_runs(model))


# What is gathered.


def test_artifact_alone_says_in_a_line_each_what_more_takes(folder: Path) -> None:
    data = gather_report(folder / "small.onnx.d")
    assert data.missing == {
        "tradeoff": f"{RECORDING}, or {SEARCHED}",
        "steps": RECORDING,
        "images": RECORDING,
        "operators": RECORDING,
        "errors": f"{RECORDING}, {PLAN} and {MODEL}",
    }
    assert data.curves
    assert data.graphs is not None
    text = render_report(data)
    assert re.findall(r'<section id="([a-z]+)"', text) == [
        name for name in SECTIONS if name not in data.missing
    ]
    lines = re.findall(r"<li>(.*?) <span[^>]*>Needs (.*?)\.</span>", text)
    assert [needs for _, needs in lines] == list(data.missing.values())
    assert ("Why is it slow?", RECORDING) in lines


def test_artifact_of_a_search_shows_its_front(
    folder: Path, model: nn.Module, tmp_path: Path
) -> None:
    searched = Plan.load(folder / "plan")
    export_onnx(optimize(model, searched), tmp_path / "searched.onnx.d")
    data = gather_report(tmp_path / "searched.onnx.d")
    assert data.front == searched.front
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "searched.onnx.d")])
    assert "budget 0.7" in result.output


def test_artifact_and_model_give_the_same_energies(folder: Path, model: nn.Module) -> None:
    alone, with_model = (
        gather_report(folder / "small.onnx.d"),
        gather_report(folder / "plan", model=model),
    )
    assert alone.curves
    assert alone.curves == with_model.curves


def test_plan_with_model_shows_energies_and_front(folder: Path, model: nn.Module) -> None:
    data = gather_report(folder / "plan", model=model)
    assert data.front is not None
    assert data.curves
    for curve in data.curves:
        assert curve.kept[0] == 0.0
        shares = list(curve.kept.values())
        assert shares == sorted(shares)
        assert shares[-1] == pytest.approx(1.0, rel=1e-6)  # float32 energies, summed
    assert data.missing["steps"].startswith("an artifact of this plan")
    assert "plan" not in data.missing.get("errors", "")  # that is what was given


def test_plan_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    other = small_model(1)
    Plan.from_trajectory(other, small_runs(other), schedule=SCHEDULE, rank=2).save(tmp_path / "p")
    with pytest.raises(SubjectError, match=r"^subject: plan: expected the plan of the artifact's"):
        gather_report(folder / "small.onnx.d", plan=Plan.load(tmp_path / "p"))


def test_recording_is_no_target(folder: Path) -> None:
    with pytest.raises(SubjectError, match="got a file of the kind recording"):
        gather_report(folder / "runs.safetensors")


@pytest.mark.parametrize("name", ["report.txt", "report"])
def test_output_must_be_a_page(folder: Path, name: str) -> None:
    arguments = ["report", str(folder / "plan"), "-o", str(folder / name)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert not (folder / name).exists()


def test_command_says_nothing_and_leaves_nothing_below_home(folder: Path, tmp_path: Path) -> None:
    """Graphviz's library for fonts and ONNX Runtime both write there when they are loaded."""
    home, output = tmp_path / "nowhere" / "home", tmp_path / "report.html"
    done = subprocess.run(
        [Path(sys.executable).with_name("calicache"), "report", "small.onnx.d", "-o", output],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not home.parent.exists()


# The page.


def test_page_has_every_section_and_needs_no_network(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r'<section id="([a-z]+)"', text) == SECTIONS
    # These results are neither images nor was a decoder given.
    assert re.findall("Needs ([a-z ]+)", text) == ["results in pixels"]
    assert len(text) < 3e6
    own = text.split("<script>")[0] + text[text.index('<script id="charts"') :]
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", own)
    assert "@import" not in own


def test_text_of_a_plan_cannot_become_markup(folder: Path, tmp_path: Path) -> None:
    data = gather_report(folder / "small.onnx.d")
    write_report(data, tmp_path / "<b>&.html")
    renamed = folder / "small.onnx.d"
    (tmp_path / "<i>evil<").symlink_to(renamed)
    text = render_report(gather_report(tmp_path / "<i>evil<"))
    assert "<i>evil<" not in text
    assert "&lt;i&gt;evil&lt;" in text


def test_parts_that_are_not_drawn_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = gather_report(folder / "small.onnx.d")
    assert data.graphs is not None
    assert "parts are drawn" not in render_report(data)
    monkeypatch.setattr(report_page, "_MOST_DRAWN", 2)
    text = render_report(data)
    assert f"The first 2 of {len(data.graphs.parts)} parts are drawn" in text
    assert text.count('<template class="drawn"') == 3 * (1 + len(data.graphs.modes))


@pytest.fixture(scope="module")
def tab(browser: Any, page: Path) -> Iterator[Any]:
    """The page in a browser, drawn once, and what it says on its console or asks of a network."""
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.said = said = []
    tab.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: said.append(request.url) if "http" in request.url else None)
    tab.goto(page.as_uri())
    tab.wait_for_selector("#chart-operators-0 .main-svg")
    assert tab.locator("#mode").input_value() == "CALIBRATE"
    yield tab
    tab.close()


@pytest.fixture
def opened(tab: Any) -> Any:
    """The page with its graphs as when it was opened; nothing may be said or asked for."""
    tab.select_option("#mode", "CALIBRATE")
    tab.select_option("#part", index=0)  # empties the field
    tab.evaluate("delete document.querySelector('#after').dataset.aimed")
    yield tab
    assert tab.said == []


def test_charts_are_drawn_and_a_hover_tells_the_value(opened: Any) -> None:
    assert opened.locator(".chart .main-svg").count() >= opened.locator(".chart").count() >= 7
    bars = opened.locator("#chart-schedule-0 .nsewdrag").first
    bars.scroll_into_view_if_needed()
    box = bars.bounding_box()
    bars.hover(position={"x": box["width"] / STEPS / 2, "y": 0.9 * box["height"]})
    label = opened.locator("#chart-schedule-0 .hovertext").first
    label.wait_for()
    assert re.search(r"step \d: [A-Z]+", label.text_content())


def test_first_chart_has_the_search_and_this_plan_by_macs_and_by_time(opened: Any) -> None:
    assert opened.locator(".chart").first.get_attribute("id") == "chart-tradeoff-0"
    names = opened.locator("#chart-tradeoff-0 .legendtext").all_text_contents()
    assert names == [
        "found by the search",
        "this plan in the search",
        "this plan by MACs",
        "this plan by time, measured",
    ]


def test_errors_by_branch_and_step_are_a_coloured_table(opened: Any) -> None:
    rows = opened.locator("#errors tbody tr")
    names = rows.locator("th").all_text_contents()
    assert (names[0], names[-1], len(names)) == (LATENTS, OUTPUT, 5)
    cells = rows.nth(1).locator("td")
    texts = cells.all_text_contents()
    assert len(texts) == STEPS
    assert texts[2] == ""  # FORECAST computes no branch
    assert float(texts[1]) > 1e-5
    background = "cell => getComputedStyle(cell).backgroundColor"
    assert cells.nth(1).evaluate(background) != cells.nth(2).evaluate(background)


@pytest.mark.parametrize("width", [1280, 420])
def test_page_is_no_wider_than_the_screen(browser: Any, page: Path, width: int) -> None:
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(page.as_uri())
    tab.wait_for_selector("#chart-operators-0 .main-svg")
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    for chart in tab.locator(".chart .main-svg").all():
        assert chart.bounding_box()["width"] <= width
    tab.close()


def test_table_of_one_row_is_not_folded(folder: Path) -> None:
    searched = gather_report(folder / "plan")
    assert searched.front is not None
    one = replace(searched.front, points=searched.front.points[:1], choice=0)
    folds = [
        re.search(r'<section id="tradeoff".*?</section>', render_report(data), re.DOTALL)
        for data in (searched, replace(searched, front=one))
    ]
    assert [fold is not None and "<details>" in fold.group() for fold in folds] == [True, False]


def test_bars_of_steps_stand_side_by_side(opened: Any) -> None:
    points = opened.locator("#chart-schedule-0 .bars .point path")
    boxes = sorted(
        (points.nth(k).bounding_box() for k in range(points.count())), key=lambda b: b["x"]
    )
    assert len(boxes) == STEPS
    for left, right in pairwise(boxes):
        assert left["x"] + left["width"] <= right["x"]


def test_graph_zooms_by_key_and_finds_a_layer(opened: Any) -> None:
    after = opened.locator("#after")
    after.scroll_into_view_if_needed()
    view = opened.locator("#after .svg-pan-zoom_viewport")
    before = view.get_attribute("transform")
    after.focus()
    opened.keyboard.press("+")
    opened.wait_for_function(
        "old => document.querySelector('#after .svg-pan-zoom_viewport')"
        ".getAttribute('transform') !== old",
        arg=before,
    )
    opened.select_option("#mode", "CALIBRATE")
    opened.fill("#node", "blocks.2.fc2")
    opened.keyboard.press("Enter")
    opened.wait_for_selector("#after .looked-for")
    assert opened.locator("#part").input_value() == "blocks.2"
    assert opened.locator("#after .looked-for[data-mark=inserted]").count() >= 2  # down and up


def test_name_of_a_layer_leads_to_its_calibration_branch(opened: Any) -> None:
    """From the top of the page, by what a newcomer sees: one field, one name."""
    assert "blocks.2.fc2" in opened.locator("#layers").inner_html()
    opened.evaluate("scrollTo(0, 0)")
    opened.fill("#node", "blocks.2.fc2")
    opened.keyboard.press("Enter")
    inserted = opened.locator("#after .looked-for[data-mark=inserted]")
    inserted.first.wait_for()
    opened.wait_for_selector("#after[data-aimed='blocks.2.fc2']")
    opened.wait_for_timeout(100)  # the viewer moves with the next frame
    frame, hits = opened.locator("#after").bounding_box(), opened.locator("#after .node.looked-for")
    boxes = [hits.nth(k).bounding_box() for k in range(hits.count())]
    for box in boxes:  # all of them in sight
        assert frame["x"] <= box["x"]
        assert box["x"] + box["width"] <= frame["x"] + frame["width"]
        assert frame["y"] <= box["y"]
        assert box["y"] + box["height"] <= frame["y"] + frame["height"]
    tall = max(box["y"] + box["height"] for box in boxes) - min(box["y"] for box in boxes)
    wide = max(box["x"] + box["width"] for box in boxes) - min(box["x"] for box in boxes)
    assert max(tall / frame["height"], wide / frame["width"]) > 0.4  # and not lost in the frame
    told = opened.locator("#found").inner_text()
    assert re.fullmatch(
        r"blocks\.2\.fc2: calibrated at rank 2, \d+ inserted, \d+ removed, \d kept values read",
        told,
    )


def test_row_of_the_energies_leads_to_the_graph(opened: Any) -> None:
    opened.click("#energy summary")
    opened.click("#energy button.to-graph >> text=blocks.1.fc1")
    opened.locator("#after .looked-for[data-mark=inserted]").first.wait_for()
    assert opened.locator("#part").input_value() == "blocks.1"
    assert opened.evaluate("document.activeElement.id") == "after"


def test_layer_is_found_while_its_name_is_typed(opened: Any) -> None:
    opened.locator("#node").press_sequentially("blocks.2.fc2")
    opened.locator("#after .looked-for").first.wait_for()
    assert opened.locator("#part").input_value() == "blocks.2"


def test_leaving_the_field_keeps_how_a_graph_was_moved(opened: Any) -> None:
    opened.locator("#node").press_sequentially("blocks.2.fc2")
    opened.wait_for_selector("#after[data-aimed='blocks.2.fc2']")
    opened.evaluate("document.querySelector('#after svg').dataset.seen = 'yes'")
    opened.locator("#after").focus()  # the field has changed, and says so now
    opened.wait_for_timeout(100)
    assert opened.locator("#after svg[data-seen=yes]").count() == 1  # not drawn again


def test_name_that_is_nowhere_is_told(opened: Any) -> None:
    opened.fill("#node", "blocks.99")
    opened.keyboard.press("Enter")
    opened.wait_for_function("document.querySelector('#found').textContent !== ''")
    assert opened.locator("#found").inner_text() == "nothing of that name in this mode"


def test_theme_is_the_readers_choice(opened: Any) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(paper)
    opened.click("#theme")
    assert opened.evaluate(paper) != light
    assert opened.locator("#theme").get_attribute("aria-pressed") == "true"
    opened.click("#theme")
    assert opened.evaluate(paper) == light


def test_screenshot_is_kept(opened: Any) -> None:
    place = Path(__file__).parents[3] / "out" / "report.png"
    place.parent.mkdir(exist_ok=True)
    opened.screenshot(path=place, full_page=True)
    assert place.stat().st_size > 10_000
