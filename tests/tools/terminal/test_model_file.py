"""Models named on a command line: functions in files, folders that diffusers wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from support.models import diffusers_calls, shake
from torch import nn

from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.errors import LibraryError, ModelError
from calicache.tools.terminal.model_file import call_in_file, load_model

SOURCE = """
from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

VALUE = 3


@dataclasses.dataclass
class Config:
    width: int = 3  # dataclasses look this word up in the file's own module


def build() -> nn.Module:
    from beside import WIDTH  # when it is called, not when the file is read

    torch.manual_seed(0)
    return nn.Linear(WIDTH, 2).eval()


def training():
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()


def half_training():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    model[1].train()
    return model


def number():
    return VALUE


def with_argument(width):
    return nn.Linear(width, 2)


def failing():
    raise KeyError("no such layer")


def _hidden():
    return None
"""
FAILING_LINE = SOURCE[: SOURCE.index("raise KeyError")].count("\n") + 1


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder: with spaces"
    folder.mkdir()
    (folder / "beside.py").write_text("WIDTH = 5\n")
    path = folder / "my model.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def saved(diffusers_dit: DiTTransformer2DModel, tmp_path: Path) -> Path:
    diffusers_dit.save_pretrained(tmp_path / "a transformer")
    return tmp_path / "a transformer"


def test_function_of_a_file_gives_the_model(file: Path) -> None:
    before = list(sys.path)
    model = load_model(f"{file}:build")
    torch.manual_seed(0)
    expected = nn.Linear(5, 2)
    assert hash_weights(model) == hash_weights(expected)
    assert sys.path == before


def test_file_is_found_from_where_the_command_runs(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    assert isinstance(load_model("my model.py:build"), nn.Linear)
    with pytest.raises(ModelError, match=f"line {FAILING_LINE} of my model.py"):
        load_model("my model.py:failing")


def test_file_replaces_no_module_of_the_same_name(file: Path) -> None:
    clash = file.with_name("json.py")
    clash.write_text("import torch\n\ndef build():\n    return torch.nn.Identity().eval()\n")
    load_model(f"{clash}:build")
    assert sys.modules["json"] is json


def test_any_value_can_be_had_from_a_function(file: Path) -> None:
    assert call_in_file(f"{file}:number", "a number", lambda value: value == 3) == 3


@pytest.mark.parametrize(
    ("function", "got"),
    [
        ("number", "got int 3"),
        ("training", " in training mode"),
        ("half_training", " in training mode"),
        ("with_argument", "TypeError: with_argument() missing 1 required positional argument"),
        ("failing", f"KeyError: 'no such layer' (line {FAILING_LINE} of my model.py)"),
        ("VALUE", "Config, build, training, half_training, number, with_argument, failing, got"),
        ("", "got ''"),
    ],
)
def test_function_that_gives_no_model_is_refused(file: Path, function: str, got: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(f"{file}:{function}")
    assert got in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("nowhere", "neither of them"),
        ("nowhere.py:build", "no Python file 'nowhere.py'"),
        ("README.md:build", "no Python file 'README.md'"),
    ],
)
def test_anything_else_is_refused(name: str, got: str) -> None:
    with pytest.raises(ModelError, match=r"FILE\.py:FUNCTION, or the folder") as caught:
        load_model(name)
    assert caught.value.got == got


def test_broken_file_is_told_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def build(:\n")
    with pytest.raises(ModelError, match=r"SyntaxError: .*broken\.py, line 1"):
        load_model(f"{tmp_path / 'broken.py'}:build")


def test_folder_of_diffusers_gives_the_model(
    diffusers_dit: DiTTransformer2DModel, saved: Path
) -> None:
    model = load_model(str(saved))
    assert not model.training
    assert hash_weights(model) == hash_weights(diffusers_dit)
    for got, expected in zip(diffusers_calls(model), diffusers_calls(diffusers_dit), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_folder_keeps_the_dtype_it_was_saved_in(tmp_path: Path) -> None:
    model = shake(
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=1,
            sample_size=8,
            num_embeds_ada_norm=10,
        )
    ).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half", max_shard_size="20KB")  # several files
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 1
    assert hash_weights(load_model(str(tmp_path / "half"))) == hash_weights(model)


def test_folder_without_weights_is_refused(saved: Path) -> None:
    (saved / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="expected the folder of a model that diffusers saved"):
        load_model(str(saved))


@pytest.mark.parametrize(
    "content",
    [None, "{", '{"architectures": ["T5"]}', '{"_class_name": "MyDiT"}'],
)
def test_other_folders_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load_model(str(tmp_path))
    assert "FILE.py:FUNCTION" in caught.value.fix


def test_folder_of_a_pipeline_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(ModelError, match="whole pipeline") as caught:
        load_model(str(tmp_path))
    assert str(tmp_path / "transformer") in caught.value.fix


def test_missing_diffusers_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an import then finds
    with pytest.raises(LibraryError, match=r"calicache\[evaluate\]"):
        load_model(str(saved))
