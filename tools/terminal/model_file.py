"""The user's own model, from a function in a Python file or from a folder that diffusers wrote."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from calicache.graph_passes.common.errors import ModelError, reason_of
from calicache.tools.terminal.options import file_and_function, import_library

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(spec: str) -> nn.Module:
    """The model that an argument names, in eval mode.

    Args:
        spec: `FILE.py:FUNCTION`, a function without arguments that returns the model, or a folder
            that `save_pretrained` of a diffusers model wrote; that one is loaded in the dtype it
            was saved in, since a plan is bound to the exact values.

    Raises:
        ModelError: it is neither of them, or cannot be loaded.
    """
    if Path(spec).is_dir():
        return _load_folder(Path(spec))
    model: nn.Module = call_in_file(spec, "an nn.Module in eval mode", _is_ready)
    return model


def call_in_file(spec: str, what: str, fits: Callable[[Any], bool]) -> Any:
    """What a function without arguments returns.

    The file can import its neighbours, as if Python were started with it.

    Args:
        spec: `FILE.py:FUNCTION`.
        what: it has to return, in words.
        fits: whether a value is such a thing.

    Raises:
        ModelError: there is no such file or function, it fails or returns something else.
    """
    path, name = file_and_function(spec)
    with _neighbours(path), _failures_told(spec, path):
        module = _import_file(path)
        function = getattr(module, name, None)
        if not callable(function):
            names = [key for key, value in vars(module).items() if _is_own(module, key, value)]
            raise ModelError(
                spec,
                expected=f"a function of {path.name}: {', '.join(names) or 'it has none'}",
                got=repr(name),
                fix="Choose one that takes no arguments and returns the model.",
            )
        result = function()
    if not fits(result):
        training = " in training mode" * (isinstance(result, nn.Module) and not _is_ready(result))
        raise ModelError(
            spec,
            expected=f"a function that returns {what}",
            got=f"{type(result).__name__} {result!r:.60}{training}",
            fix="Let it return that.",
        )
    return result


def _is_ready(value: object) -> bool:
    return isinstance(value, nn.Module) and not any(part.training for part in value.modules())


def _import_file(path: Path) -> Any:
    # A name of its own: a file called model.py must not replace another module of that name.
    name = "calicache_file_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    return module


def _is_own(module: Any, name: str, value: Any) -> bool:
    here = getattr(value, "__module__", None) == module.__name__
    return here and callable(value) and not name.startswith("_")


@contextmanager
def _neighbours(path: Path) -> Iterator[None]:
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(folder)


@contextmanager
def _failures_told(spec: str, path: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the user's code may raise anything
        lines = [
            str(frame.lineno)
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path.absolute()
        ]
        place = f" (line {lines[-1]} of {path.name})" if lines else ""
        raise ModelError(
            spec,
            expected="a function that returns the model",
            got=reason_of(error) + place,
            fix="Mend the file, or run it by itself to see all of the traceback.",
        ) from error


def _load_folder(folder: Path) -> nn.Module:
    diffusers = import_library("diffusers", "diffusers", "has its class", "evaluate")
    if (folder / "model_index.json").is_file():
        raise ModelError(
            str(folder),
            expected="the folder of a model that diffusers saved",
            got="the folder of a whole pipeline",
            fix=f"Name the denoiser in it, such as {folder / 'transformer'}.",
        )
    try:
        model = diffusers.AutoModel.from_pretrained(
            str(folder), torch_dtype=saved_dtype(folder), local_files_only=True
        )
        got = type(model).__name__
    except Exception as error:  # whatever the loader of its class raises
        model, got = None, reason_of(error)
    if isinstance(model, nn.Module):
        return model.eval()
    raise ModelError(
        str(folder),
        expected="the folder of a model that diffusers saved",
        got=got,
        fix="Save the model with save_pretrained, or give FILE.py:FUNCTION.",
    )


def load_config(folder: Path) -> nn.Module:
    """A model of diffusers from its config.json alone, on the meta device: no weights are read.

    Raises:
        ModelError: there is no such file, or its class cannot be made of it.
    """
    diffusers = import_library("diffusers", "diffusers", "has its class", "evaluate")
    try:
        config = json.loads((folder / "config.json").read_text())
        with torch.device("meta"):
            model: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    except Exception as error:  # whatever the class raises
        raise ModelError(
            str(folder),
            expected="a folder with the config.json of a model that diffusers has",
            got=reason_of(error),
            fix="Give the folder of the denoiser, or FILE.py:FUNCTION.",
        ) from error
    return model.to("meta", saved_dtype(folder)).eval()


def saved_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that most tensors of a saved model have; None where there are none.

    diffusers makes float32 of everything when it is not told the dtype.
    """
    dtypes: Counter[torch.dtype] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
            dtypes.update(_DTYPES[name] for name in names if name in _DTYPES)
    return dtypes.most_common(1)[0][0] if dtypes else None
