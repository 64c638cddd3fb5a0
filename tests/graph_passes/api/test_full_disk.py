"""Saves of every kind where the disk ends: told with the path, and the old one is whole."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.small.subjects import small_model, small_plan, small_runs

from calicache.graph_passes import LatencyTable, Plan, Recording
from calicache.graph_passes.settings.latency import BranchChoice, LatencyRow

pytestmark = pytest.mark.slow

# In a process of its own: a limit on the size of files, as if the disk ended there.
CODE = """
import resource, sys
from calicache.graph_passes import LatencyTable, Plan, Recording
from calicache.graph_passes.common.errors import CalicacheError

kinds = {"plan": Plan, "recording": Recording, "table": LatencyTable}
values = {name: kind.load(f"{sys.argv[1]}/{name}") for name, kind in kinds.items()}
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for name, value in values.items():
    for target in (name, f"new {name}"):
        try:
            value.save(f"{sys.argv[1]}/{target}")
            print(f"{target}: saved")
        except CalicacheError as error:
            print(f"{target}: {error.where} | {error.expected} | {error.got} | {error.fix}")
"""


@dataclass(frozen=True)
class Saved:
    """What was saved before, and what was said when it was saved again."""

    folder: Path
    lines: dict[str, str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder, model = tmp_path_factory.mktemp("disk"), small_model()
    recording = small_runs(model)
    recording.save(folder / "recording")
    small_plan(model, recording).save(folder / "plan")
    row = LatencyRow("blocks.*", BranchChoice.REUSE, 0, 1.0, 0.5)
    LatencyTable("h", "r", 1, 1.0, 0.1, (row,)).save(folder / "table")
    command = [sys.executable, "-c", CODE, str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return Saved(folder, dict(line.split(": ", 1) for line in told.splitlines()))


@pytest.mark.parametrize("old", ["", "new "], ids=["replacing", "new"])
@pytest.mark.parametrize(
    ("name", "words"),
    [("plan", "a plan"), ("recording", "a recording"), ("table", "a latency table")],
)
def test_a_disk_that_is_full_is_told(saved: Saved, name: str, words: str, old: str) -> None:
    where, expected, got, fix = saved.lines[f"{old}{name}"].split(" | ")
    assert where == str(saved.folder / f"{old}{name}")
    assert expected == f"a place where {words} can be written"
    assert "File too large" in got
    assert fix.endswith("what was there before is unchanged.")


def test_what_was_there_is_whole_and_nothing_is_left_over(saved: Saved) -> None:
    assert sorted(path.name for path in saved.folder.iterdir()) == ["plan", "recording", "table"]
    model = small_model()
    plan, expected = Plan.load(saved.folder / "plan"), small_plan(model, small_runs(model))
    assert (plan.recipe, plan.binding) == (expected.recipe, expected.binding)
    assert len(Recording.load(saved.folder / "recording").calls) == 6
    assert LatencyTable.load(saved.folder / "table").forecast == 0.1
