"""A manifest against the models of its folder, in the layouts that test_export.py does not have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from support.small.subjects import other_artifact

from calicache.export import Layout, Session
from calicache.export.artifact.folder import load_artifact
from calicache.export.artifact.model_file import read_interface
from calicache.graph_passes.common.disk.documents import sum_of
from calicache.graph_passes.common.disk.hashing import sha256_of
from calicache.graph_passes.common.errors import ArtifactError

pytestmark = pytest.mark.slow

Change = Callable[[dict[str, Any]], object]


def edit(folder: Path, change: Change) -> None:
    """Change a manifest and mend all sums: the files are what it says, byte for byte."""
    content = json.loads((folder / "manifest.json").read_text())
    for record in content["files"]:
        file = folder / record["name"]
        record |= {"size": file.stat().st_size, "sha256": sha256_of(file)}
    change(content)
    content["sha256"] = sum_of(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def copied(layout: Layout, tmp_path: Path) -> Path:
    return Path(shutil.copytree(other_artifact("RCUFRC", layout), tmp_path / "copy.onnx.d"))


@pytest.mark.parametrize("layout", Layout)
def test_every_layout_agrees_with_its_models(layout: Layout) -> None:
    folder = other_artifact("RCUFRC", layout)
    manifest = load_artifact(folder)
    assert manifest.layout is layout
    assert {"weights.bin"} == {
        name for file in folder.glob("*.onnx") for name in read_interface(file).external
    }


CASES: dict[str, tuple[Layout, Change, str]] = {
    "a read left out": (
        Layout.PAIR,
        lambda c: c["modes"][1]["reads"].pop(),
        "calibrate.onnx takes ",
    ),
    "a read too many": (
        Layout.PAIR,
        lambda c: c["modes"][3]["reads"].append(c["modes"][1]["reads"][0]),
        "forecast.onnx does not take ",
    ),
    "a cache too many": (
        Layout.PAIR,
        lambda c: (
            c["caches"].append(c["caches"][0] | {"name": "cache_x"}),
            c["modes"][0]["writes"].append("cache_x"),
        ),
        "refresh.onnx gives other outputs: cache_x_next",
    ),
    "a cache that no REFRESH writes": (
        Layout.PAIR,
        lambda c: c["caches"].append(c["caches"][0] | {"name": "cache_x"}),
        "writes that do not belong to the rest",
    ),
    "a cache written twice": (
        Layout.PAIR,
        lambda c: c["modes"][1]["writes"].extend([c["caches"][0]["name"]] * 2),
        "writes that do not belong to the rest",
    ),
    "a cache of other rows": (
        Layout.PAIR,
        lambda c: c["caches"][0]["shape"].__setitem__(0, 77),
        "(77, ",
    ),
    "other noise": (
        Layout.SAMPLER,
        lambda c: c["sampler"]["noise"].update(shape=[1, 5, 4]),
        "model.onnx takes noise as float32 (2, 5, 4), not as float32 (1, 5, 4)",
    ),
    "a scale that it has not": (
        Layout.SAMPLER,
        lambda c: c["sampler"]["noise"].update(name="x"),
        "model.onnx takes noise, which the manifest does not have",
    ),
    "no model": (
        Layout.STEP,
        lambda _: None,
        "model.onnx is no ONNX model",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_models_do_not_have_is_refused(case: str, tmp_path: Path) -> None:
    layout, change, reason = CASES[case]
    folder = copied(layout, tmp_path)
    if case == "no model":
        (folder / "model.onnx").write_bytes(b"hello, this is no model")
    edit(folder, change)
    with pytest.raises(ArtifactError) as caught:
        Session(folder)
    assert reason in str(caught.value)


def test_two_models_that_changed_places_are_refused(tmp_path: Path) -> None:
    folder = copied(Layout.PAIR, tmp_path)
    (folder / "calibrate.onnx").rename(folder / "x")
    (folder / "reuse.onnx").rename(folder / "calibrate.onnx")
    (folder / "x").rename(folder / "reuse.onnx")
    edit(folder, lambda _: None)
    with pytest.raises(ArtifactError, match=r"calibrate\.onnx does not take "):
        Session(folder)


@pytest.mark.parametrize("place", ["/etc/passwd", "../x", "graphs.json.gz"])
def test_weights_of_a_model_that_lie_elsewhere_are_refused(place: str, tmp_path: Path) -> None:
    folder = copied(Layout.STEP, tmp_path)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place if entry.key == "location" else entry.value
    onnx.save(model, folder / "model.onnx")
    edit(folder, lambda _: None)
    with pytest.raises(ArtifactError, match=f"model.onnx refers to {place}, which is not listed"):
        Session(folder)


def test_weights_inside_a_branch_or_an_attribute_are_seen(tmp_path: Path) -> None:
    def outside(name: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[1])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        return tensor

    value = onnx.helper.make_tensor_value_info("y", 1, [1])
    constant = onnx.helper.make_node("Constant", [], ["y"], value=outside("attribute"))
    inner = onnx.helper.make_graph([constant], "inner", [], [value], [outside("inside")])
    choice = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    condition = onnx.helper.make_tensor_value_info("c", 9, [])
    graph = onnx.helper.make_graph([choice], "outer", [condition], [value], [outside("top")])
    function = onnx.helper.make_function("own", "f", [], ["y"], [constant], [])
    model = onnx.helper.make_model(graph, functions=[function])
    onnx.save(model, tmp_path / "a.onnx")
    interface = read_interface(tmp_path / "a.onnx")
    assert interface.external == {"top", "inside", "attribute"}
    assert interface.inputs == {"c": ("bool", ())}
    assert set(interface.branches) == {"inner"}
