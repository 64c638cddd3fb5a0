"""What a user hands to a session: checked against the manifest, held on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calicache.export.artifact.manifest import Manifest, SamplerRecord
from calicache.export.artifact.names import GUIDANCE_INPUT
from calicache.export.artifact.open_sizes import Sizes
from calicache.export.session.runtime import OrtValue, onnx_runtime
from calicache.graph_passes.common.arguments import number
from calicache.graph_passes.common.errors import RunError, reason_of
from calicache.graph_passes.recording.reads import check_fixed
from calicache.graph_passes.recording.signature import TensorSpec


class InputBuffers:
    """One buffer on the device for every input, filled anew for every step.

    The addresses stay the same, and what the caller does to his arrays later changes nothing.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._buffers: dict[tuple[str, tuple[int, ...], str], OrtValue] = {}

    def fill(self, name: str, value: np.ndarray[Any, Any]) -> OrtValue:
        """The input's buffer with a copy of the value; a new one for another form."""
        value = in_pairs(value)
        key = (name, value.shape, str(value.dtype))
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = onnx_runtime().OrtValue.ortvalue_from_shape_and_type(
                value.shape, value.dtype.type, self._device
            )
            self._buffers = {k: b for k, b in self._buffers.items() if k[0] != name} | {key: buffer}
        buffer.update_inplace(value)
        return buffer


def in_pairs(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Complex values as the graph takes them: real and imaginary part in a last dimension."""
    return np.stack([value.real, value.imag], -1) if np.iscomplexobj(value) else value


def checked_inputs(
    specs: Sequence[TensorSpec], inputs: Mapping[str, Any], note: str = ""
) -> dict[str, np.ndarray[Any, Any]]:
    """Exactly what the specs name, with their shapes and dtypes.

    Args:
        specs: of all inputs.
        inputs: by name.
        note: on what is expected, for who gives something else.

    Raises:
        RunError: another name, shape or dtype, or a value that NumPy cannot hold.
    """
    unknown = sorted(set(inputs) - {spec.name for spec in specs})
    if unknown:
        raise wrong_input(unknown[0], " | ".join(spec.name for spec in specs), "another name")
    missing = [spec for spec in specs if spec.name not in inputs]
    if missing:
        raise wrong_input(missing[0].name, f"{missing[0]}{note}", "nothing")
    return {spec.name: _checked(spec, _array(spec, inputs[spec.name]), note) for spec in specs}


def sized_inputs(
    manifest: Manifest,
    specs: Sequence[TensorSpec],
    inputs: Mapping[str, Any],
    sizes: Sizes,
    note: str = "",
) -> dict[str, np.ndarray[Any, Any]]:
    """What `checked_inputs` gives, where the open sizes are these."""
    return checked_inputs([manifest.sized(spec, sizes) for spec in specs], inputs, note)


def check_values(manifest: Manifest, feed: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Refuse other values than the recorded ones of inputs that decide sizes.

    Raises:
        RunError: there are some.
    """
    fixed = {name: manifest.fixed[name] for name in feed if name in manifest.fixed}
    # torch takes no arrays that run backwards, or that it may not write.
    check_fixed(fixed, {name: torch.from_numpy(feed[name].copy()) for name in fixed})


def shapes_of(inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of what has one."""
    shapes = {name: getattr(value, "shape", None) for name, value in inputs.items()}
    return {name: tuple(shape) for name, shape in shapes.items() if shape is not None}


def _array(spec: TensorSpec, value: Any) -> np.ndarray[Any, Any]:
    """A value as an array; gradients stay behind, and tensors of other devices are copied."""
    try:
        return value.numpy(force=True) if isinstance(value, Tensor) else np.asarray(value)
    except Exception as error:  # whatever the value's own class raises
        raise wrong_input(spec.name, str(spec), f"no array ({reason_of(error)})") from error


def _checked(spec: TensorSpec, value: np.ndarray[Any, Any], note: str) -> np.ndarray[Any, Any]:
    if value.shape != spec.shape or str(value.dtype) != spec.dtype:
        raise wrong_input(spec.name, f"{spec}{note}", f"{value.dtype} {value.shape}")
    return value


def parts_note(record: SamplerRecord) -> str:
    """How the guidance parts make up the batch of an input of a whole run."""
    if record.parts == 1:
        return ""
    places = {0: ", the conditional one first", 1: ", the conditional one last"}
    place = "" if record.conditional is None else places.get(record.conditional, "")
    return f": {record.parts} guidance parts along the batch, in the recorded order{place}"


def wrong_input(name: str, expected: str, got: str) -> RunError:
    """An input that is not what the artifact takes."""
    return RunError(
        f"input {name}",
        expected=expected,
        got=got,
        fix="Pass what the model was recorded with, or export a plan for this call.",
    )


def finite_scale(scale: Any) -> float:
    """A guidance scale.

    Raises:
        RunError: it is no finite number.
    """
    value = number(GUIDANCE_INPUT, scale, RunError)
    if not math.isfinite(value):
        raise wrong_input(GUIDANCE_INPUT, "a finite number", str(value))
    return value
