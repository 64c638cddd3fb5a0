"""Session: runs an artifact in ONNX Runtime, with the caches kept on the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from calicache.export.artifact.folder import load_artifact
from calicache.export.artifact.manifest import Layout, model_file
from calicache.export.artifact.names import GUIDANCE_INPUT, LATENTS_OUTPUT, STEP_INPUT, next_name
from calicache.export.artifact.open_sizes import Sizes
from calicache.export.session.caches import Caches
from calicache.export.session.inputs import (
    check_values,
    finite_scale,
    in_pairs,
    parts_note,
    shapes_of,
    sized_inputs,
    wrong_input,
)
from calicache.export.session.opening import check_cuda_graphs, open_model, running
from calicache.export.session.run import SessionRun
from calicache.export.session.runtime import (
    OrtValue,
    Provider,
    device_of,
    named_provider,
    onnx_runtime,
)
from calicache.graph_passes.api.running.runs import binding_run, started_run
from calicache.graph_passes.common.arguments import of_kind, path_of, whole_number
from calicache.graph_passes.common.disk.replacing import standing
from calicache.graph_passes.common.errors import ArtifactError, ExportError, RunError
from calicache.graph_passes.rewriting.insertion import slot_name
from calicache.graph_passes.settings.choices import StepMode

NO_GRAPH = -1  # ONNX Runtime neither captures nor replays


class Session:
    """Runs the steps of one denoising after another, or a whole one.

    The caches are ONNX Runtime values on the provider's device; they go from one step to the
    next without a copy and are replaced on REFRESH steps alone.

    Args:
        path: the folder of an artifact written by `export_onnx`, in any layout.
        provider: one that the installed ONNX Runtime has, by name, or its name and settings:
            `("TensorrtExecutionProvider", {"trt_fp16_enable": "1"})`.
        options: SessionOptions of ONNX Runtime, for threads and profiling.
        cuda_graphs: capture every mode as a CUDA graph and replay it, which takes the launches
            of the single kernels away; for the layout `pair` on CUDAExecutionProvider.

    Raises:
        ArtifactError: the folder is damaged.
        ExportError: ONNX Runtime is not installed, the provider is not one that it has or cannot
            run the layout, the options are none, or CUDA graphs are asked for where it has none.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        provider: Provider = "CPUExecutionProvider",
        options: Any = None,
        cuda_graphs: bool = False,
    ) -> None:
        path = path_of(path, ArtifactError)
        self.manifest = load_artifact(path)
        name, settings = named_provider(provider)
        if options is not None:
            of_kind("options", options, onnx_runtime().SessionOptions, ExportError)
        layout, modes = self.manifest.layout, sorted(set(self.manifest.schedule))
        if cuda_graphs:
            check_cuda_graphs(layout, name)
            settings = {**settings, "enable_cuda_graph": "1"}
        folder = standing(path)
        files = {mode: folder / model_file(layout, mode) for mode in modes}
        sessions = {
            file: open_model(file, layout, (name, settings), options)
            for file in sorted({*files.values()})
        }
        self._sessions = {mode: sessions[file] for mode, file in files.items()}
        self._device = device_of(self._sessions[StepMode.REFRESH])
        self._own_run = SessionRun.empty(self.manifest, self._device)
        self._graphs: dict[tuple[int, ...], int] | None = {} if cuda_graphs else None

    def sample(
        self, noise: Any, guidance_scale: float | None = None, **inputs: Any
    ) -> np.ndarray[Any, Any]:
        """Run a whole denoising; returns the latents after the last step, like `noise`.

        Args:
            noise: (B, ...) float32, as the sampler starts with.
            guidance_scale: another than the recorded one.
            inputs: the model's tensors that stay the same over a run, all guidance parts at once:
                stacked along the batch, in the order that the error for another shape tells.

        Raises:
            RunError: the artifact has another layout, an input is not what it takes, or ONNX
                Runtime cannot run it.
        """
        record = self.manifest.sampler
        if record is None:
            raise RunError(
                "sample",
                expected="an artifact in the layout sampler",
                got=f"layout {self.manifest.layout.value}",
                fix="Export with layout='sampler', or call step() for every step.",
            )
        given = {record.noise.name: noise, **inputs}
        sizes = self.manifest.sizes_of(shapes_of(given))
        feed = {
            **sized_inputs(self.manifest, (record.noise,), {record.noise.name: noise}, sizes),
            **sized_inputs(self.manifest, record.inputs, inputs, sizes, parts_note(record)),
        }
        if record.guidance is None and guidance_scale is not None:
            raise wrong_input(GUIDANCE_INPUT, "no scale: this sampler has none", "one")
        check_values(self.manifest, feed)
        scale = record.guidance if guidance_scale is None else finite_scale(guidance_scale)
        if scale is not None:
            feed[GUIDANCE_INPUT] = np.array(scale, np.float32)
        session = self._sessions[StepMode.REFRESH]
        used = {value.name for value in session.get_inputs()}
        feed = {name: in_pairs(value) for name, value in feed.items() if name in used}
        with running("sample"):
            latents: np.ndarray[Any, Any] = session.run([LATENTS_OUTPUT], feed)[0]
        return latents

    def step(self, step: int, call: int = 0, /, **inputs: Any) -> np.ndarray[Any, Any]:
        """Run one step; returns the model's first output.

        Args:
            step: index in the run, 0 .. len(schedule) - 1.
            call: which of the step's calls of the model, where the recorded steps had several.
            inputs: the model's own tensors by name, NumPy arrays or CPU tensors.

        Raises:
            RunError: a step out of range or before any REFRESH, another shape, dtype or name
                than the artifact's, or ONNX Runtime cannot run it: then the run is over.
        """
        return self.step_outputs(step, call, **inputs)[0]

    def step_outputs(
        self, step: int, call: int = 0, /, **inputs: Any
    ) -> tuple[np.ndarray[Any, Any], ...]:
        """Run one step; returns all of the model's outputs. See `step`."""
        run, mode = self._run, self._mode(step, call)
        sizes = self.manifest.sizes_of(shapes_of(inputs))
        feed = sized_inputs(self.manifest, self.manifest.inputs, inputs, sizes)
        self._change_sizes(step, sizes)
        session, kept = self._sessions[mode], run.kept[call]
        binding = session.io_binding()
        bound = self._bind_inputs(binding, session, step, feed, mode, kept)
        targets = self._bind_outputs(binding, session, mode, kept)
        try:
            with running(f"step {step}"):
                session.run_with_iobinding(binding, self._run_options([*bound, *targets]))
        except RunError:
            kept.start()  # what a REFRESH let go before it failed is not there any more
            raise
        names = (output.name for output in session.get_outputs())
        values = dict(zip(names, binding.get_outputs(), strict=True))
        kept.keep({name: values[next_name(name)] for name in self.manifest.mode(mode).writes})
        if self.manifest.layout is Layout.PAIR:
            run.outputs[mode] = {name: values[name] for name in self.manifest.outputs}
        return tuple(values[name].numpy().copy() for name in self.manifest.outputs)

    def start_run(self, run: SessionRun | None = None) -> AbstractContextManager[SessionRun]:
        """A denoising of its own, for the steps of this thread or asyncio task inside `with`.

        Without it all threads share one denoising.

        Args:
            run: to go on with one, as servers do that take steps of many runs in turn; a new
                one where None.
        """
        return binding_run(self, run or SessionRun.empty(self.manifest, self._device))

    @property
    def _run(self) -> SessionRun:
        return started_run(self, SessionRun) or self._own_run

    def reset(self) -> None:
        """Drop the caches; the next step must be a REFRESH."""
        self._run.kept = SessionRun.empty(self.manifest, self._device).kept

    def end_profiling(self) -> tuple[Path, ...]:
        """Write the profiles of a session opened with `enable_profiling`; returns their files.

        Raises:
            RunError: it was opened without, or they are written already.
        """
        files = [session.end_profiling() for session in dict.fromkeys(self._sessions.values())]
        if not all(files):
            raise RunError(
                "end_profiling",
                expected="a session that is profiled",
                got="one that is not",
                fix="Open it with options whose enable_profiling is True, and end it once.",
            )
        return tuple(map(Path, files))

    def _mode(self, step: int, call: int) -> StepMode:
        schedule = self.manifest.schedule
        if self.manifest.layout is Layout.SAMPLER:
            raise RunError(
                "step",
                expected="an artifact in the layout step or pair",
                got="layout sampler",
                fix="Call sample() for the whole run, or export in another layout.",
            )
        fix = "Record and plan with as many calls in a step."
        call = whole_number("call", call, RunError, 0, self.manifest.calls_per_step - 1, fix)
        fix = "Export a plan with this many steps."
        mode = schedule[whole_number("step", step, RunError, 0, len(schedule) - 1, fix)]
        counts = self._run.kept[call].counts
        if mode is not StepMode.REFRESH and counts and not any(counts.values()):
            raise RunError(
                f"step {step}",
                expected="a REFRESH step before it",
                got="empty caches",
                fix="Start the run at step 0.",
            )
        return mode

    def _change_sizes(self, step: int, sizes: Sizes) -> None:
        """Let a run begin with other sizes than the one before; within one they stay the same.

        Raises:
            RunError: they do not.
        """
        run = self._run
        if sizes == run.sizes:
            return
        if step:
            axis = next(axis for axis in sizes if sizes[axis] != run.sizes.get(axis))
            raise wrong_input(axis, f"{run.sizes.get(axis)}, as in this run", f"{sizes[axis]}")
        fresh = SessionRun.empty(self.manifest, self._device)
        run.kept, run.outputs, run.sizes = fresh.kept, fresh.outputs, sizes

    def _bind_inputs(
        self,
        binding: Any,
        session: Any,
        step: int,
        feed: dict[str, np.ndarray[Any, Any]],
        mode: StepMode,
        kept: Caches,
    ) -> list[OrtValue | None]:
        used = {value.name for value in session.get_inputs()}
        if mode is StepMode.REFRESH:
            check_values(self.manifest, feed)
        feed[STEP_INPUT] = np.array(step, np.int64)
        bound = {name: self._run.inputs.fill(name, v) for name, v in feed.items() if name in used}
        if step == 0:  # a new run: weight 0 times a NaN of the run before would be NaN
            kept.start()
        for back in range(self.manifest.history):
            for cache in self.manifest.caches:
                name = slot_name(cache.name, back)
                if name in used:
                    bound[name] = kept.read(self.manifest.sized(cache, self._run.sizes), back)
        for name, value in bound.items():
            binding.bind_ortvalue_input(name, value)
        return [*bound.values()]

    def _bind_outputs(
        self,
        binding: Any,
        session: Any,
        mode: StepMode,
        kept: Caches,
    ) -> list[OrtValue | None]:
        """Where the outputs go: None where ONNX Runtime allocates."""
        buffers: dict[str, OrtValue | None] = {**self._run.outputs.get(mode, {})}
        writes = self.manifest.mode(mode).writes
        buffers |= {next_name(name): kept.buffer(name) for name in writes}
        targets = [buffers.get(output.name) for output in session.get_outputs()]
        for output, buffer in zip(session.get_outputs(), targets, strict=True):
            if buffer is None:
                binding.bind_output(output.name, self._device)
            else:
                binding.bind_ortvalue_output(output.name, buffer)
        return targets

    def _run_options(self, values: Sequence[OrtValue | None]) -> Any:
        """Which CUDA graph to replay: one for every combination of addresses."""
        if self._graphs is None:
            return None
        graph = NO_GRAPH
        if None not in values:
            addresses = tuple(value.data_ptr() for value in values if value is not None)
            graph = self._graphs.setdefault(addresses, len(self._graphs) + 1)
        options = onnx_runtime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options
