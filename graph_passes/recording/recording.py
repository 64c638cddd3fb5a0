"""A recording: what a sampler fed to a model, split into runs and steps.

A run is one denoising from noise to result; a new run is seen where the timestep turns back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, distributed

from calicache.graph_passes.common.arguments import path_of, whole_number
from calicache.graph_passes.common.disk.files import atomic_path
from calicache.graph_passes.common.disk.tensor_files import (
    digests,
    read_tensors,
    write_tensors,
)
from calicache.graph_passes.common.errors import RecordError
from calicache.graph_passes.common.ranks import Ranks
from calicache.graph_passes.recording.input_classes import Dependence, classify_inputs
from calicache.graph_passes.recording.recording_file import (
    RECORDING,
    TARGET,
    RecordingJson,
    apart,
    check_loaded,
)
from calicache.graph_passes.recording.signature import CallSignature
from calicache.graph_passes.recording.step_calls import batch_signature, batch_size, merge_calls
from calicache.graph_passes.recording.timestep import (
    Call,
    Run,
    Timestep,
    calls_of,
    cut_runs,
    find_timestep,
)

NO_TENSORS: Mapping[int, Tensor] = MappingProxyType({})


class Recording:
    """The recorded calls of one model, oldest first. Nothing in it changes.

    Args:
        calls: tensors by argument name, detached, on the CPU.
        signature: the form that all calls share; None where nothing was recorded.
        results: what the sampler made of a run, by the number of calls before its end.
        outputs: the first tensor that the model returned, as far as known, by place of the call.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        signature: CallSignature | None,
        results: Mapping[int, Tensor] = NO_TENSORS,
        outputs: Mapping[int, Tensor] = NO_TENSORS,
    ) -> None:
        self._calls, self._signature = calls, signature
        self._results, self._outputs = results, outputs

    @property
    def calls(self) -> Sequence[Call]:
        """Tensors by argument name, call by call."""
        return self._calls

    @property
    def results(self) -> Mapping[int, Tensor]:
        """Latents after the last step of a run, by the number of calls before its end."""
        return self._results

    @property
    def outputs(self) -> Mapping[int, Tensor]:
        """The first tensor that the model returned, by the place of the call, as far as known."""
        return self._outputs

    @property
    def signature(self) -> CallSignature:
        """The form that all calls share.

        Raises:
            RecordError: nothing was recorded.
        """
        if self._signature is None:
            raise RecordError(
                "recording",
                expected="at least one call of the model",
                got="none",
                fix="Run the sampler inside `with record(model) as recording:`.",
            )
        return self._signature

    @cached_property
    def timestep(self) -> Timestep | None:
        """The input that counts the denoising down; None without one."""
        names = [spec.name for spec in self.signature.tensors]
        return find_timestep(names, self.calls, self.results)

    @property
    def calls_per_step(self) -> int:
        """How often a step of the sampler calls the model."""
        return calls_of(self.timestep)

    @cached_property
    def denoisings(self) -> tuple[Run, ...]:
        """All calls of every denoising, the calls of a step one after another."""
        return tuple(cut_runs(self.timestep, self.calls, self.results))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """One call of every step; several runs side by side where a step calls several times.

        With guidance by two calls a step, the conditional calls are one run and the
        unconditional ones another.
        """
        beside = self.calls_per_step
        return tuple(run[k::beside] for run in self.denoisings for k in range(beside))

    @cached_property
    def run_outputs(self) -> tuple[tuple[Tensor | None, ...], ...]:
        """The model's output in every call of `runs`; None where it is not known."""
        counts = [0, *accumulate(len(run) for run in self.denoisings)]
        beside = self.calls_per_step
        return tuple(
            tuple(self.outputs.get(place) for place in range(first + k, end, beside))
            for first, end in pairwise(counts)
            for k in range(beside)
        )

    @cached_property
    def ends(self) -> tuple[Tensor | None, ...]:
        """What the sampler made of every run's last output, where `finish` was given it."""
        counts = accumulate(len(run) for run in self.denoisings)
        return tuple(self.results.get(n) for n in counts for _ in range(self.calls_per_step))

    @cached_property
    def steps(self) -> int:
        """Steps of the longest run."""
        return max(len(run) for run in self.runs)

    @cached_property
    def dependence(self) -> Mapping[str, Dependence]:
        """Class of every tensor argument.

        Raises:
            DependenceError: no run has two steps, or no input depends on the latent.
        """
        return classify_inputs([spec.name for spec in self.signature.tensors], self.runs)

    def by_step(self) -> Recording:
        """The calls of every step in one batch; this recording where a step has one call.

        Raises:
            NoSampler: the calls of a step differ in what has no batch dimension.
        """
        beside = self.calls_per_step
        if beside == 1:
            return self
        batch = batch_size(self.signature, self.dependence)
        calls = [
            merge_calls(run[first : first + beside], batch)
            for run in self.denoisings
            for first in range(0, len(run), beside)
        ]
        results = {count // beside: value for count, value in self.results.items()}
        signature = batch_signature(self.signature, beside, batch)
        return Recording(calls, signature, results, self._outputs_by_step(batch))

    def _outputs_by_step(self, batch: int) -> dict[int, Tensor]:
        """The outputs of every step in one batch, where all are known and have that dimension."""
        beside = self.calls_per_step
        outputs: dict[int, Tensor] = {}
        for step in range(len(self.calls) // beside):
            places = range(step * beside, (step + 1) * beside)
            parts = [self.outputs[place] for place in places if place in self.outputs]
            if len(parts) == beside and all(part.shape[:1] == (batch,) for part in parts):
                outputs[step] = torch.cat(parts)
        return outputs

    def first_calls(self) -> Recording:
        """The first call of every step; this recording where a step has one call."""
        beside = self.calls_per_step
        return self if beside == 1 else self.take_runs(range(0, len(self.runs), beside))

    def take_runs(self, places: Sequence[int]) -> Recording:
        """A recording of some runs, each with one call a step.

        Args:
            places: in `runs`.

        Raises:
            RecordError: there is no such run.
        """
        calls: list[Call] = []
        results: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        for place in places:
            place = whole_number("run", place, RecordError, 0, len(self.runs) - 1)
            known = enumerate(self.run_outputs[place], start=len(calls))
            outputs |= {at: value for at, value in known if value is not None}
            calls.extend(self.runs[place])
            end = self.ends[place]
            if end is not None:
                results[len(calls)] = end.clone()  # a run may be taken twice
        return Recording(calls, self._signature, results, outputs)

    def gather(self, group: distributed.ProcessGroup | None = None) -> Recording:
        """What every process of a group has recorded, as one recording for all of them.

        The first runs of every process come first, then the second ones: where process r of n has
        recorded the seeds `seeds[r::n]`, the runs stand in the order of the seeds.

        Args:
            group: all its processes call this; None for all that torch.distributed knows, or this
                one alone where it is not started.

        Raises:
            RecordError: the processes have recorded calls of other forms.
            RankError: a process is gone.
        """
        if group is None and distributed.is_initialized():
            group = distributed.group.WORLD
        ranks = Ranks.of(group)
        forms = [form for form in ranks.gather(self._signature) if form is not None]
        for form in forms:
            if form != forms[0]:
                name, expected, got = forms[0].difference(form)
                raise RecordError(
                    f"argument {name}",
                    expected=f"{expected} in every process",
                    got=got,
                    fix="Record calls of one form in all of them.",
                )
        calls: list[Call] = []
        results: dict[int, Tensor] = {}
        outputs: dict[int, Tensor] = {}
        for run, known, end in ranks.in_order(self._whole_runs()):
            outputs |= {len(calls) + place: value for place, value in known.items()}
            calls += run
            if end is not None:
                results[len(calls)] = end
        return Recording(calls, forms[0] if forms else None, results, outputs)

    def _whole_runs(self) -> list[tuple[Run, dict[int, Tensor], Tensor | None]]:
        """Calls, known outputs by place and the result of every denoising."""
        if self._signature is None:
            return []
        counts = [0, *accumulate(len(run) for run in self.denoisings)]
        return [
            (
                list(run),
                {k: self.outputs[first + k] for k in range(len(run)) if first + k in self.outputs},
                self.results.get(first + len(run)),
            )
            for first, run in zip(counts, self.denoisings, strict=False)
        ]

    def __repr__(self) -> str:
        if not self.calls:
            return "Recording without calls"
        inputs = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in self.signature.tensors)
        ended = f"{len(self.results)} finished" if self.results else "none finished"
        counts = f"{len(self.calls)} calls in {len(self.runs)} runs, {ended}"
        return f"Recording of {counts}\n  calls take {inputs}"

    def save(self, path: Path | str) -> None:
        """Write one safetensors file; a value shared by several calls is stored once.

        Raises:
            RecordError: nothing was recorded, something else than a recording is there, or the
                file cannot be written.
        """
        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        table: list[dict[str, str]] = []
        for call in self.calls:
            for value in call.values():
                if id(value) not in keys:
                    keys[id(value)] = f"value.{len(keys)}"
                    tensors[keys[id(value)]] = value
            table.append({name: keys[id(value)] for name, value in call.items()})
        tensors |= {f"result.{n}": value for n, value in self.results.items()}
        tensors |= apart({f"output.{n}": value for n, value in self.outputs.items()})
        content = RecordingJson(
            self.signature, tuple(table), tuple(self.results), digests(tensors), tuple(self.outputs)
        )
        with atomic_path(path_of(path, RecordError), TARGET) as temporary:
            write_tensors(RECORDING, content, tensors, temporary)

    @staticmethod
    def load(path: Path | str) -> Recording:
        """Read what `save` wrote.

        Raises:
            RecordError: the file is missing, damaged, or something else.
        """
        content, values = read_tensors(RECORDING, path_of(path, RecordError))
        try:
            calls = [{name: values[key] for name, key in row.items()} for row in content.calls]
            results = {count: values[f"result.{count}"] for count in content.results}
            outputs = {place: values[f"output.{place}"] for place in content.outputs}
            _ = [spec.torch_dtype for spec in content.signature.tensors]
        except (KeyError, RecordError) as error:
            raise RECORDING.refused(path, error) from error
        for call in calls:
            check_loaded(call, content.signature, path)
        return Recording(calls, content.signature, results, outputs)
