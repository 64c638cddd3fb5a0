"""A plugin of pytest that runs the tests of diffusers, with optimised transformers if asked to.

`python -m pytest -p support.pipelines.plugin --optimised tests/pipelines/dit` in a checkout of
diffusers; `suite.py` runs many files with and without it, and compares.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import diffusers  # noqa: F401  # the installed one, before the checkout's own is on the path
import pytest
from support.pipelines.replaced import Replacements
from support.pipelines.text_parts import serve_parts

REPLACEMENTS = pytest.StashKey[Replacements]()
OUTCOMES = pytest.StashKey[dict[str, dict[str, str | int]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimised", action="store_true", help="replace every transformer")
    parser.addoption("--outcomes", type=Path, help="file for the outcome of every test, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    serve_parts(Path(tempfile.mkdtemp(prefix="parts of pipelines ")))
    config.stash[REPLACEMENTS], config.stash[OUTCOMES] = Replacements(), {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.optimised:
        for case in {item.cls for item in items if isinstance(item, pytest.Function) and item.cls}:
            config.stash[REPLACEMENTS].replace_in(case)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    replacements = item.config.stash[REPLACEMENTS]
    before = replacements.calls
    try:
        return (yield)
    finally:
        outcome = item.config.stash[OUTCOMES].setdefault(item.nodeid, {"outcome": "passed"})
        outcome["calls"] = replacements.calls - before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.outcome != "passed":  # also of what comes before or after the test itself
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message if crash else str(report.longrepr)
        outcome = {"outcome": report.outcome, "why": said.strip()[:400]}
        item.config.stash[OUTCOMES][item.nodeid] = dict(outcome)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = session.config.option.outcomes
    to_the_end = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if target is not None and to_the_end:
        stash = session.config.stash
        found = {"tests": stash[OUTCOMES], "left": stash[REPLACEMENTS].left}
        target.write_text(json.dumps(found, indent=1))
