"""Recording what a sampler feeds to a model: every call, split into runs and steps.

Nothing of the sampler is known or changed. A run is one denoising from noise to result;
a new run is seen where the timestep turns back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from calicache.graph_passes.common.errors import RecordError
from calicache.graph_passes.common.files import atomic_path
from calicache.graph_passes.recording.signature import (
    CallSignature,
    ConstantSpec,
    TensorSpec,
    flatten_call,
)
from calicache.graph_passes.recording.timestep import (
    Call,
    Run,
    Timestep,
    calls_of,
    cut_runs,
    find_timestep,
)


@dataclass(frozen=True, slots=True)
class Recording:
    """The recorded calls of one model, oldest first.

    Attributes:
        calls: tensors by argument name, detached, on the CPU.
        signatures: the form of the calls: one entry, filled by the first call.
        results: what `finish` was given, by the number of calls before it.
    """

    calls: list[Call] = field(default_factory=list)
    signatures: list[CallSignature] = field(default_factory=list)
    results: dict[int, Tensor] = field(default_factory=dict)

    @property
    def signature(self) -> CallSignature:
        """The form that all calls share.

        Raises:
            RecordError: nothing was recorded.
        """
        if not self.signatures:
            raise RecordError(
                "recording",
                expected="at least one call of the model",
                got="none",
                fix="Run the sampler inside `with record(model) as recording:`.",
            )
        return self.signatures[0]

    @property
    def timestep(self) -> Timestep | None:
        """The input that counts the denoising down; None without one."""
        names = [spec.name for spec in self.signature.tensors]
        return find_timestep(names, self.calls, self.results)

    @property
    def calls_per_step(self) -> int:
        """How often a step of the sampler calls the model."""
        return calls_of(self.timestep)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The calls of every denoising; several runs side by side where a step calls several times.

        With guidance by two calls a step, the conditional calls are one run and the
        unconditional ones another.
        """
        timestep = self.timestep
        beside = calls_of(timestep)
        whole = cut_runs(timestep, self.calls, self.results)
        return tuple(run[k::beside] for run in whole for k in range(beside))

    @property
    def ends(self) -> tuple[Tensor | None, ...]:
        """What the sampler made of every run's last output, where `finish` was given it."""
        timestep = self.timestep
        counts = accumulate(len(run) for run in cut_runs(timestep, self.calls, self.results))
        beside = range(calls_of(timestep))
        return tuple(self.results.get(count) for count in counts for _ in beside)

    @property
    def steps(self) -> int:
        """Steps of the longest run."""
        return max(len(run) for run in self.runs)

    def take_runs(self, places: Sequence[int]) -> Recording:
        """A recording of some runs, for a recording with one call a step.

        Args:
            places: in `runs`.
        """
        runs, ends = self.runs, self.ends
        taken = Recording(signatures=self.signatures[:1])
        for place in places:
            taken.calls.extend(runs[place])
            end = ends[place]
            if end is not None:
                taken.results[len(taken.calls)] = end.clone()  # a run may be taken twice
        return taken

    def finish(self, latents: Tensor) -> None:
        """Keep the result of the run that just ended: the latents after the sampler's last step.

        Without it the last update of the sampler is not known, since no call of the model shows
        it: the last step's output is then left as it is, and the `sampler` layout needs the
        scheduler.

        Args:
            latents: of one sample each, (B, ...), or as the model takes them, guidance included.

        Raises:
            RecordError: no run is open.
        """
        if not self.calls or len(self.calls) in self.results:
            raise RecordError(
                "finish",
                expected="calls of the model before it",
                got="none since the last result",
                fix="Call it once after every whole run of the sampler.",
            )
        self.results[len(self.calls)] = _keep(latents, None)

    def append(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Keep one call.

        Raises:
            RecordError: the call has another form than the ones before.
        """
        flat = flatten_call(model, args, kwargs)
        signature = flat.signature()
        if not self.signatures:
            self.signatures.append(signature)
        elif _specs(signature) != _specs(self.signature):
            raise _changed_form(self.signature, signature)
        last = self.calls[-1] if self.calls else {}
        self.calls.append({name: _keep(v, last.get(name)) for name, v in flat.tensors.items()})

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
                fix="Record the recording again.",
            ) from error
        for call in calls:
            _check_loaded(call, signature, path)
        return Recording(list(calls), [signature], results)


def _keep(value: Tensor, last: Tensor | None) -> Tensor:
    kept = value.detach().to("cpu", copy=True)
    return last if last is not None and torch.equal(kept, last) else kept


def _changed_form(first: CallSignature, now: CallSignature) -> RecordError:
    before = _specs(first)
    after = _specs(now)
    name = next((n for n in {**before, **after} if before.get(n) != after.get(n)), "call")
    moving_number = isinstance(before.get(name), ConstantSpec)
    return RecordError(
        f"argument {name}",
        expected=str(before.get(name)),
        got=str(after.get(name)),
        fix="Pass it as a tensor: a Python value must be the same in every call."
        if moving_number
        else "Record calls of one form: the same arguments, shapes and dtypes.",
    )


def _specs(signature: CallSignature) -> dict[str, TensorSpec | ConstantSpec]:
    tensors = {spec.name: spec for spec in signature.tensors}
    constants = {spec.name: spec for spec in signature.constants}
    return {**tensors, **constants}


def _check_loaded(call: Call, signature: CallSignature, path: Path | str) -> None:
    for spec in signature.tensors:
        tensor = call.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape or tensor.dtype != spec.torch_dtype:
            raise RecordError(
                f"{path}: {spec.name}",
                expected=str(spec),
                got="nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}",
                fix="The file is damaged; record the recording again.",
            )
