"""What a model's Python code reads off tensors: recorded once, answered from the record in tracing.

`mask.sum(1).tolist()`, `if image.any():`, `x[mask]`: sizes and branches that tracing cannot know.
Where every recorded call gives the same answers, the graph is made for these answers, and the
inputs that they come from must keep their recorded values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pydantic_core import from_json
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.disk.hashing import digest
from calicache.graph_passes.common.errors import CaptureError, RecordError, RunError, reason_of
from calicache.graph_passes.common.offloading import input_device, lacks_weights
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import CallSignature

NOTHING, DIFFERENT = "[]", "null"
MAX_REPEATS = 2**24  # rows that one repeat_interleave may make
Answer = Any  # numbers, booleans and lists of them
_SCALARS: Mapping[Callable[..., Any], Callable[[Any], Any]] = {
    Tensor.item: lambda value: value,
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__index__: int,
}


def find_reads(model: nn.Module, recording: Recording) -> str:
    """The answers to all that the model reads, as JSON; `[]` where it reads nothing.

    The first call of every run is run, and the last of the first run. Nothing is run for a
    model on the meta device.

    Returns:
        The answers, or `null` where they differ from call to call: tracing then has to do without.

    Raises:
        RecordError: the model is none, or the recording.
    """
    of_kind("model", model, nn.Module, RecordError)
    of_kind("recording", recording, Recording, RecordError)
    if lacks_weights(model):
        return NOTHING
    runs, signature = recording.runs, recording.signature
    first = read_call(model, signature, runs[0][0])
    calls = [runs[0][-1], *(run[0] for run in runs[1:])]
    if first != NOTHING and any(read_call(model, signature, call) != first for call in calls):
        return DIFFERENT
    return first


def read_call(model: nn.Module, signature: CallSignature, call: Mapping[str, Tensor]) -> str:
    """The answers to all that the model reads in one call, which is run."""
    device = input_device(model)
    arguments = signature.unflatten([value.to(device) for value in call.values()])
    with torch.no_grad(), _Recorder() as recorder:
        model(**arguments)
    return json.dumps(recorder.answers)


@contextmanager
def answering(answers: str) -> Iterator[list[Tensor]]:
    """Answer the model's reads from the record; yields the tensors that were read, in order.

    Without a record the reads are left to the tracer.

    Raises:
        CaptureError: the model reads more than was recorded.
    """
    seen: list[Tensor] = []
    if answers in (NOTHING, DIFFERENT):
        yield seen
        return
    # A fake tensor's own tolist would go round the mode.
    with patch.object(FakeTensor, "tolist", Tensor.tolist), _Answers(read_answers(answers), seen):
        yield seen


def read_answers(answers: str) -> list[Answer]:
    """The answers of a record, in order; none where they differ from call to call.

    Raises:
        CaptureError: it is no record of answers.
    """
    try:
        record = from_json(answers)
    except ValueError as error:
        raise _no_answers(reason_of(error)) from error
    if record is None:
        return []
    if not isinstance(record, list) or not _is_answer(record):
        raise _no_answers(f"{answers:.40}")
    return record


def fits_fixed(fixed: Mapping[str, Sequence[str]], values: Mapping[str, Tensor]) -> bool:
    """Whether a graph was made for these values.

    Args:
        fixed: digests of the values that it was made for, by argument.
        values: arguments of a call.
    """
    return all(digest(values[name]) in digests for name, digests in fixed.items())


def check_fixed(fixed: Mapping[str, Sequence[str]], values: Mapping[str, Tensor]) -> None:
    """Refuse values that the graph was not made for.

    Args:
        fixed: digests of the recorded values, by argument.
        values: arguments of a call.

    Raises:
        RunError: one of them has another value than the recorded ones.
    """
    for name, digests in fixed.items():
        if not fits_fixed({name: digests}, values):
            raise RunError(
                f"argument {name}",
                expected="the values that were recorded: sizes inside the model depend on them",
                got="others",
                fix="Record and plan with these values, such as masks of this prompt length.",
            )


class _Reads(TorchFunctionMode):
    """Sends every read through `answer`, everything else on."""

    def answer(self, tensor: Tensor, read: Callable[[Tensor], Answer]) -> Answer:
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func in _SCALARS:
            return _SCALARS[func](self.answer(args[0], lambda t: t.item()))
        if func is Tensor.tolist:
            return self.answer(args[0], lambda t: t.tolist())
        if func is Tensor.numpy:
            kind = str(args[0].dtype).removeprefix("torch.")
            return np.array(self.answer(args[0], lambda t: t.tolist()), kind)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and _decides(args[1]):
            return func(args[0], self._places(args[1]), *args[2:])
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            return self._repeated(func, args, options)
        if func is torch.where and len(args) + len(options) == 1:
            return self._true_places(*args, **options)
        if func in (torch.masked_select, Tensor.masked_select):
            source, mask = (*args, *options.values())
            return source.expand_as(mask)[self._places(mask.expand_as(source))]
        if func in (torch.nonzero, Tensor.nonzero):
            places = self._true_places(args[0])
            return places if options.get("as_tuple") else torch.stack(places, -1)
        return func(*args, **options)

    def _true_places(self, tensor: Tensor) -> tuple[Tensor, ...]:
        places = self.answer(
            tensor, lambda t: [place.tolist() for place in t.nonzero(as_tuple=True)]
        )
        return tuple(torch.tensor(place, dtype=torch.int64).to(tensor.device) for place in places)

    def _places(self, index: Any) -> tuple[Any, ...]:
        """An index with plain places: where masks are true, what the ends of slices are."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if _is_mask(part) and part.ndim == 0 and self.answer(part, lambda t: t.item()):
                parts.append(None)  # as torch has it: another dimension, of size 1
            elif _is_mask(part):
                parts.extend(self._true_places(part))
            elif isinstance(part, slice):
                parts.append(slice(*map(self._end, (part.start, part.stop, part.step))))
            else:
                parts.append(part)
        return tuple(parts)

    def _end(self, end: Any) -> Any:
        return self.answer(end, lambda t: t.item()) if isinstance(end, Tensor) else end

    def _repeated(
        self, func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        """torch.repeat_interleave(source, repeats, dim), or (repeats) alone: places 0 0 1 2 2."""
        names = ("input", "repeats", "dim")
        given = dict(zip(names, args, strict=False)) | options
        alone = "repeats" not in given or "input" not in given
        source, repeats = given.get("input"), given.get("repeats")
        if alone:
            source, repeats = None, source if repeats is None else repeats
        if not isinstance(repeats, Tensor):
            return func(*args, **options)
        counts = self.answer(repeats, lambda t: t.flatten().tolist())
        dim = given.get("dim")
        if source is not None:
            source = source.flatten() if dim is None else source
            counts = counts * source.shape[dim or 0] if len(counts) == 1 else counts
        if sum(counts) > MAX_REPEATS:
            raise _no_answers(f"{sum(counts)} repeats")
        places = torch.tensor([p for p, count in enumerate(counts) for _ in range(count)])
        places = places.to(repeats.device, torch.int64)
        return places if source is None else source.index_select(dim or 0, places)


class _Recorder(_Reads):
    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []

    def answer(self, tensor: Tensor, read: Callable[[Tensor], Answer]) -> Answer:
        self.answers.append(read(tensor))
        return self.answers[-1]


class _Answers(_Reads):
    def __init__(self, answers: list[Answer], seen: list[Tensor]) -> None:
        super().__init__()
        self.answers, self.seen = answers, seen

    def answer(self, tensor: Tensor, read: Callable[[Tensor], Answer]) -> Answer:  # noqa: ARG002
        if len(self.seen) == len(self.answers):
            raise CaptureError(
                "reads",
                expected=f"the {len(self.answers)} values that every recorded call read",
                got="another one",
                fix="Make the plan again from the recording.",
            )
        self.seen.append(tensor)
        return self.answers[len(self.seen) - 1]


def _is_answer(value: Any) -> bool:
    inside = value if isinstance(value, list) else ()
    return isinstance(value, bool | int | float | list) and all(map(_is_answer, inside))


def _no_answers(got: str) -> CaptureError:
    return CaptureError(
        "reads",
        expected="a list of numbers and lists of them",
        got=got,
        fix="Make the plan again from the recording.",
    )


def _decides(index: Any) -> bool:
    """Whether values of the index decide the shape: a mask, or a slice that ends at a tensor."""
    return any(
        _is_mask(part)
        or (
            isinstance(part, slice)
            and any(isinstance(end, Tensor) for end in (part.start, part.stop, part.step))
        )
        for part in (index if isinstance(index, tuple) else (index,))
    )


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool
