"""`calicache graph`, run as a user runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from model import FashionDiT
from support.artifacts import exported
from support.models import sample_dit
from support.small.graphs import (
    CALIBRATE,
    FORECAST,
    REFRESH,
    Mix,
    compiled,
    small_graphs,
    small_model,
)
from typer.testing import CliRunner, Result

from calicache.export import Layout, Session, export_onnx, load_artifact, read_sampler
from calicache.export.artifact.graph_file import read_graphs
from calicache.graph_passes import (
    OptimizedModel,
    Plan,
    StepMode,
    fold_blocks,
    optimize,
    record,
    view_block,
    view_graphs,
)
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.errors import ArtifactError, CalicacheError
from calicache.tools.cli import app
from calicache.tools.graph.command import GraphFormat, first_cheap_mode, view_text
from calicache.tools.graph.draw import mermaid_text, svg_text
from calicache.tools.graph.text import block_text, folded_text

pytestmark = pytest.mark.slow

SPACES = "a path with spaces.onnx.d"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph") / SPACES
    export_onnx(small_model(0), folder)
    return folder


@pytest.fixture(scope="module")
def tiny() -> OptimizedModel:
    return compiled(Mix(), 2, 5, 8)


def calicache(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


# --- what it prints and writes -------------------------------------------------------------------


def test_block_of_a_mode_is_printed_as_text(artifact: Path) -> None:
    command = [str(Path(sys.executable).parent / "calicache"), "graph", str(artifact)]
    command += ["--block", "1", "--mode", "calibrate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == block_text(view_block(small_graphs(0), "blocks.1", CALIBRATE))
    assert "\x1b" not in done.stdout


def test_whole_model_and_the_first_cheap_mode_are_the_defaults(artifact: Path) -> None:
    assert view_text(artifact) == folded_text(fold_blocks(small_graphs(0), CALIBRATE))
    assert first_cheap_mode(artifact) == "calibrate"


def test_folded_text_fits_80_columns(artifact: Path) -> None:
    for mode in ("plain", *(mode.name for mode in StepMode)):  # in any case
        text = view_text(artifact, mode=mode)
        assert max(map(len, text.splitlines())) <= 80


def test_svg_goes_into_a_file_whose_path_has_spaces(artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "my drawings" / "block 0.svg"
    arguments = ("--block", "blocks.0", "--mode", "forecast", "--format", "svg", "-o", file)
    done = calicache("graph", artifact, *arguments)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"Written: {file}\n"
    assert file.read_text() == svg_text(view_block(small_graphs(0), "blocks.0", FORECAST))
    assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_mermaid_and_json_are_those_of_the_view(artifact: Path) -> None:
    view = view_block(small_graphs(0), "0", REFRESH)

    def printed(form: GraphFormat) -> str:
        return view_text(artifact, "0", "refresh", form)

    assert printed(GraphFormat.MERMAID) == mermaid_text(view)
    content = json.loads(printed(GraphFormat.JSON))
    assert set(content) == {
        *("block", "mode", "nodes", "edges", "enters", "leaves", "writes", "macs", "plain_macs")
    }
    assert [node["name"] for node in content["nodes"]] == [node.name for node in view.nodes]


def test_output_that_is_a_folder_is_refused(artifact: Path, tmp_path: Path) -> None:
    assert "expected the name of a file, got a folder" in refused(artifact, "-o", tmp_path)
    assert not list(tmp_path.iterdir())


# --- what it refuses -----------------------------------------------------------------------------


def refused(*arguments: str | Path) -> str:
    done = calicache("graph", *arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    return " ".join(done.stderr.split())  # the terminal breaks lines


def test_unknown_block_is_refused_with_those_there_are(artifact: Path) -> None:
    assert refused(artifact, "--block", "blocks.9") == (
        "subject: block: expected before, blocks.0, blocks.1, after, got 'blocks.9'. "
        "Choose one of these."
    )


@pytest.mark.parametrize("mode", ["banana", "reuse"])
def test_mode_that_the_artifact_has_not_is_refused_with_those_it_has(
    mode: str, tiny: OptimizedModel, tmp_path: Path
) -> None:
    export_onnx(tiny, tmp_path / "d")
    with pytest.raises(CalicacheError) as caught:
        view_text(tmp_path / "d", mode=mode)
    assert str(caught.value) == (
        f"subject: mode: expected plain | refresh | calibrate, got '{mode}'. Choose one of these."
    )


@pytest.mark.parametrize("name", ["nothing here", "empty", "a file"])
def test_what_is_no_artifact_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("{}")
    with pytest.raises(ArtifactError, match=rf"{name}.*expected a manifest written by export_onnx"):
        view_text(tmp_path / name)


# --- the artifact --------------------------------------------------------------------------------


def test_artifact_lists_its_graphs_like_every_other_file(artifact: Path) -> None:
    (record,) = [f for f in load_artifact(artifact).files if f.name == "graphs.json.gz"]
    assert record.size == (artifact / "graphs.json.gz").stat().st_size
    assert record.sha256 == sha256_of(artifact / "graphs.json.gz")
    assert read_graphs(artifact) == small_graphs(0)


def test_session_does_not_look_into_the_graphs(artifact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(artifact, tmp_path / "other.d"))
    (folder / "graphs.json.gz").write_bytes(b"not JSON")
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["name"] == "graphs.json.gz":
            file |= {"size": 8, "sha256": sha256_of(folder / "graphs.json.gz")}
    manifest["sha256"] = sum_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert Session(folder).manifest.schedule == load_artifact(artifact).schedule
    with pytest.raises(ArtifactError, match=r"graphs\.json\.gz: expected graphs written by"):
        read_graphs(folder)


def test_every_layout_has_the_graphs_of_what_it_runs(dit: FashionDiT, dit_plan: Plan) -> None:
    with record(dit) as recording:
        recording.finish(sample_dit(dit))
    fast = optimize(dit, dit_plan)
    expected = view_graphs(fast.compiled.captured, fast.compiled.variant_set)
    for layout in Layout:
        sampler = read_sampler(fast, recording) if layout is Layout.SAMPLER else None
        assert read_graphs(exported(fast, layout, sampler)) == expected
