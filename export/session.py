"""Session: runs an artifact in ONNX Runtime, with the caches kept on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from calicache.export.manifest import Layout, load_artifact, model_file
from calicache.export.onnx_graph import next_name
from calicache.export.sampler_layout import GUIDANCE_INPUT, LATENTS_OUTPUT
from calicache.export.step_layout import STEP_INPUT
from calicache.graph_passes.errors import ExportError, RunError
from calicache.graph_passes.insertion import slot_name
from calicache.graph_passes.schedule import StepMode
from calicache.graph_passes.signature import TensorSpec

_DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}


class Session:
    """Runs the steps of one denoising after another, or a whole one.

    The caches are ONNX Runtime values on the provider's device; they go from one step to the
    next without a copy and are replaced on REFRESH steps alone.

    Args:
        directory: an artifact written by `export_onnx`, in any layout.
        provider: an ONNX Runtime execution provider.
        options: passed to ONNX Runtime, for threads and profiling.

    Raises:
        ArtifactError: the folder is damaged.
        ExportError: the provider is not one that this ONNX Runtime has.
    """

    def __init__(
        self,
        directory: Path | str,
        provider: str = "CPUExecutionProvider",
        options: ort.SessionOptions | None = None,
    ) -> None:
        self.manifest = load_artifact(directory)
        valid = [name for name in ort.get_available_providers() if name in _DEVICES]
        if provider not in valid:
            raise ExportError(
                "provider",
                expected=" | ".join(valid),
                got=repr(provider),
                fix="Choose one of these, or install the onnxruntime package that has it.",
            )
        self._device = _DEVICES[provider]
        layout, modes = self.manifest.layout, sorted(set(self.manifest.schedule))
        paths = {mode: Path(directory) / model_file(layout, mode) for mode in modes}
        opened = {p: _open(p, layout, provider, options) for p in sorted({*paths.values()})}
        self._sessions = {mode: opened[path] for mode, path in paths.items()}
        reads = (record.reads for record in self.manifest.modes)
        self._slots = frozenset(name for names in reads for name in names)
        self._kept: list[dict[str, ort.OrtValue]] = []

    def sample(
        self, noise: Any, guidance_scale: float | None = None, **inputs: Any
    ) -> np.ndarray[Any, Any]:
        """Run a whole denoising; returns the latents after the last step, like `noise`.

        Args:
            noise: (B, ...) float32, as the sampler starts with.
            guidance_scale: another than the recorded one.
            inputs: the model's tensors that stay the same over a run, all guidance parts at once.

        Raises:
            RunError: the artifact has another layout, or an input is not what it takes.
        """
        record = self.manifest.sampler
        if record is None:
            raise RunError(
                "sample",
                expected="an artifact in the layout sampler",
                got=f"layout {self.manifest.layout.value}",
                fix="Export with layout='sampler', or call step() for every step.",
            )
        feed = _checked_inputs((record.noise, *record.inputs), {record.noise.name: noise, **inputs})
        if record.guidance is None and guidance_scale is not None:
            raise _wrong_input(GUIDANCE_INPUT, "no scale: this sampler has none", "one")
        scale = record.guidance if guidance_scale is None else guidance_scale
        if scale is not None:
            feed[GUIDANCE_INPUT] = np.array(scale, np.float32)
        session = self._sessions[StepMode.REFRESH]
        used = {value.name for value in session.get_inputs()}
        feed = {name: value for name, value in feed.items() if name in used}
        latents: np.ndarray[Any, Any] = session.run([LATENTS_OUTPUT], feed)[0]
        return latents

    def step(self, step: int, **inputs: Any) -> np.ndarray[Any, Any]:
        """Run one step; returns the model's first output.

        Args:
            step: index in the run, 0 .. len(schedule) - 1.
            inputs: the model's own tensors by name, NumPy arrays or CPU tensors.

        Raises:
            RunError: a step out of range or before any REFRESH, or another shape, dtype or
                name than the artifact's.
        """
        return self.step_outputs(step, **inputs)[0]

    def step_outputs(self, step: int, **inputs: Any) -> tuple[np.ndarray[Any, Any], ...]:
        """Run one step; returns all of the model's outputs. See `step`."""
        mode = self._mode(step)
        session = self._sessions[mode]
        binding = session.io_binding()
        self._bind_inputs(binding, session, step, inputs, mode)
        names = [output.name for output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device)
        session.run_with_iobinding(binding)
        values = dict(zip(names, binding.get_outputs(), strict=True))
        if mode is StepMode.REFRESH:
            caches = self.manifest.caches
            fresh = {cache.name: values[next_name(cache.name)] for cache in caches}
            older = [
                {name: kept[name] for name in kept if slot_name(name, back) in self._slots}
                for back, kept in enumerate(self._kept, start=1)
            ]
            self._kept = [fresh, *older][: self.manifest.history]
        return tuple(values[name].numpy() for name in self.manifest.outputs)

    def reset(self) -> None:
        """Drop the caches; the next step must be a REFRESH."""
        self._kept = []

    def end_profiling(self) -> tuple[Path, ...]:
        """Write the profiles of a session opened with `enable_profiling`; returns their files."""
        return tuple(
            Path(session.end_profiling()) for session in dict.fromkeys(self._sessions.values())
        )

    def _mode(self, step: int) -> StepMode:
        schedule = self.manifest.schedule
        if self.manifest.layout is Layout.SAMPLER:
            raise RunError(
                "step",
                expected="an artifact in the layout step or pair",
                got="layout sampler",
                fix="Call sample() for the whole run, or export in another layout.",
            )
        if not 0 <= step < len(schedule):
            raise RunError(
                f"step {step}",
                expected=f"0 .. {len(schedule) - 1}",
                got=str(step),
                fix="Export a plan with this many steps.",
            )
        mode = schedule[step]
        if mode is not StepMode.REFRESH and self.manifest.caches and not self._kept:
            raise RunError(
                f"step {step}",
                expected="a REFRESH step before it",
                got="empty caches",
                fix="Start the run at step 0.",
            )
        return mode

    def _bind_inputs(
        self,
        binding: ort.IOBinding,
        session: ort.InferenceSession,
        step: int,
        inputs: Mapping[str, Any],
        mode: StepMode,
    ) -> None:
        used = {value.name for value in session.get_inputs()}
        feed = _checked_inputs(self.manifest.inputs, inputs)
        feed[STEP_INPUT] = np.array(step, np.int64)
        for name, value in feed.items():
            if name in used:
                binding.bind_ortvalue_input(name, self._ort_value(value))
        if step == 0:  # a new run: weight 0 times a NaN of the run before would be NaN
            self._kept = []
        reads = self.manifest.mode(mode).reads
        if mode is StepMode.REFRESH and not reads:
            # The oldest values are not read again; letting them go first lowers the peak.
            self._kept = self._kept[: self.manifest.history - 1]
        for back in range(self.manifest.history):
            for cache in self.manifest.caches:
                name = slot_name(cache.name, back)
                if name in used:
                    read = name in reads
                    value = self._kept_value(cache, back) if read else self._empty(cache)
                    binding.bind_ortvalue_input(name, value)

    def _kept_value(self, cache: TensorSpec, back: int) -> ort.OrtValue:
        """A kept refresh; one that has not been yet has weight 0, any values will do."""
        if not self._kept:
            return self._ort_value(np.zeros(cache.shape, cache.dtype))
        return self._kept[back if back < len(self._kept) else 0][cache.name]

    def _empty(self, cache: TensorSpec) -> ort.OrtValue:
        return self._ort_value(np.zeros((0, *cache.shape[1:]), cache.dtype))

    def _ort_value(self, value: np.ndarray[Any, Any]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), self._device)


def _open(
    path: Path, layout: Layout, provider: str, options: ort.SessionOptions | None
) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(path, options or _default_options(), providers=[provider])
    except Exception as error:  # ONNX Runtime has no common base for its errors
        control_flow = layout is not Layout.PAIR
        flat = ", or in the layout pair, which has no control flow" if control_flow else ""
        raise ExportError(
            f"provider {provider}",
            expected="a model that it can run",
            got=str(error),
            fix=f"Use another provider, export in another dtype{flat}.",
        ) from error


def _default_options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    # Threads that go on spinning after a run would slow down the session of the next mode.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _checked_inputs(
    specs: Sequence[TensorSpec], inputs: Mapping[str, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """Exactly what the specs name, with their shapes and dtypes."""
    unknown = sorted(set(inputs) - {spec.name for spec in specs})
    if unknown:
        raise _wrong_input(unknown[0], " | ".join(spec.name for spec in specs), "another name")
    missing = [spec for spec in specs if spec.name not in inputs]
    if missing:
        raise _wrong_input(missing[0].name, str(missing[0]), "nothing")
    return {spec.name: _checked(spec, np.asarray(inputs[spec.name])) for spec in specs}


def _checked(spec: TensorSpec, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if value.shape != spec.shape or str(value.dtype) != spec.dtype:
        raise _wrong_input(spec.name, str(spec), f"{value.dtype} {value.shape}")
    return value


def _wrong_input(name: str, expected: str, got: str) -> RunError:
    return RunError(
        f"input {name}",
        expected=expected,
        got=got,
        fix="Pass what the model was recorded with, or export a plan for this call.",
    )
