"""A recording: what a sampler fed to a model, split into runs and steps.

A run is one denoising from noise to result; a new run is seen where the timestep turns back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calicache.graph_passes.common.errors import RecordError
from calicache.graph_passes.common.files import atomic_path
from calicache.graph_passes.recording.input_classes import Dependence, classify_inputs
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

NO_RESULTS: Mapping[int, Tensor] = MappingProxyType({})


class Recording:
    """The recorded calls of one model, oldest first. Nothing in it changes.

    Args:
        calls: tensors by argument name, detached, on the CPU.
        signature: the form that all calls share; None where nothing was recorded.
        results: what the sampler made of a run, by the number of calls before its end.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        signature: CallSignature | None,
        results: Mapping[int, Tensor] = NO_RESULTS,
    ) -> None:
        self._calls, self._signature, self._results = calls, signature, results

    @property
    def calls(self) -> Sequence[Call]:
        """Tensors by argument name, call by call."""
        return self._calls

    @property
    def results(self) -> Mapping[int, Tensor]:
        """Latents after the last step of a run, by the number of calls before its end."""
        return self._results

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
        return Recording(calls, batch_signature(self.signature, beside, batch), results)

    def take_runs(self, places: Sequence[int]) -> Recording:
        """A recording of some runs, for a recording with one call a step.

        Args:
            places: in `runs`.
        """
        calls: list[Call] = []
        results: dict[int, Tensor] = {}
        for place in places:
            calls.extend(self.runs[place])
            end = self.ends[place]
            if end is not None:
                results[len(calls)] = end.clone()  # a run may be taken twice
        return Recording(calls, self._signature, results)

    def save(self, path: Path | str) -> None:
        """Write one safetensors file; a value shared by several calls is stored once."""
        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        table: list[dict[str, str]] = []
        for call in self.calls:
            for value in call.values():
                if id(value) not in keys:
                    keys[id(value)] = f"value.{len(keys)}"
                    tensors[keys[id(value)]] = value.contiguous()
            table.append({name: keys[id(value)] for name, value in call.items()})
        metadata = {
            "calicache": "recording",
            "signature": json.dumps(
                TypeAdapter(CallSignature).dump_python(self.signature, mode="json")
            ),
            "calls": json.dumps(table),
            "results": json.dumps(list(self.results)),
        }
        tensors |= {f"result.{n}": value.contiguous() for n, value in self.results.items()}
        with atomic_path(Path(path)) as temporary:
            save_file(tensors, temporary, metadata)

    @staticmethod
    def load(path: Path | str) -> Recording:
        """Read what `save` wrote.

        Raises:
            RecordError: the file is missing, damaged, or something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("calicache") != "recording":
                    raise ValueError("not a recording")
                signature = TypeAdapter(CallSignature).validate_json(metadata["signature"])
                table = TypeAdapter(list[dict[str, str]]).validate_json(metadata["calls"])
                values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                calls = [{name: values[key] for name, key in row.items()} for row in table]
                counts = TypeAdapter(list[int]).validate_json(metadata["results"])
                results = {count: values[f"result.{count}"] for count in counts}
                signature.unflatten([torch.empty(0)] * len(signature.tensors))
                if not calls:
                    raise ValueError("no calls")
        except (OSError, SafetensorError, ValidationError, ValueError, KeyError) as error:
            raise RecordError(
                str(path),
                expected="a recording written by Recording.save",
                got=f"{type(error).__name__}: {error}",
                fix="Record again.",
            ) from error
        for call in calls:
            _check_loaded(call, signature, path)
        return Recording(calls, signature, results)


def _check_loaded(call: Call, signature: CallSignature, path: Path | str) -> None:
    for spec in signature.tensors:
        tensor = call.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
            raise RecordError(
                f"{path}: {spec.name}",
                expected=str(spec),
                got="nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}",
                fix="The file is damaged; record again.",
            )
