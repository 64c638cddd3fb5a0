"""Recording the calls of a model, with nothing known of its sampler, and nothing changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes.common.arguments import of_kind
from calicache.graph_passes.common.errors import CalicacheWarning, RecordError
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import (
    CallSignature,
    ConstantSpec,
    FlatCall,
    TensorSpec,
    flatten_call,
)
from calicache.graph_passes.recording.timestep import Call

DERIVED = ("timestep", "denoisings", "runs", "run_outputs", "ends", "steps", "dependence")


class Recorder(Recording):
    """A recording that still grows: what `record` gives.

    Attributes:
        left_out: calls that asked for a step again with a text of another length.
    """

    def __init__(self) -> None:
        self._grown_calls: list[Call] = []
        self._grown_results: dict[int, Tensor] = {}
        self._grown_outputs: dict[int, Tensor] = {}
        self.left_out = 0
        super().__init__(self._grown_calls, None, self._grown_results, self._grown_outputs)

    def append(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> int | None:
        """Keep one call.

        A call that asks for the step of the last one again, with a text of another length, is left
        out.

        Returns:
            The place of the call; None where it is left out.

        Raises:
            RecordError: the call has another form than the ones before, or a tensor without
                values of its own.
        """
        flat = flatten_call(model, args, kwargs)
        signature = flat.signature()
        if self._signature is None:
            self._signature = signature
        elif _specs(signature) != _specs(self._signature):
            if not self._asks_again(self._signature, flat):
                raise _changed_form(self._signature, signature)
            self._leave_out(self._signature, signature)
            return None
        last = self.calls[-1] if self.calls else {}
        call = {name: _detached(v, last.get(name)) for name, v in flat.tensors.items()}
        self._grown_calls.append(call)
        self._forget_derived()
        return len(self._grown_calls) - 1

    def answer(self, place: int, returned: Any) -> None:
        """Keep the first tensor that a call returned, where it is one with values.

        Args:
            place: of the call.
            returned: by the model.
        """
        first = next(iter(pytree.tree_leaves(returned)), None)
        if isinstance(first, Tensor) and not _unusable(first):
            self._grown_outputs[place] = first.detach().to("cpu", copy=True)
            self._forget_derived()

    def finish(self, latents: Tensor) -> None:
        """Keep the result of the run that just ended: the latents after the sampler's last step.

        Without it the last update of the sampler is not known, since no call of the model shows
        it: the last step's output is then left as it is, and the `sampler` layout needs the
        scheduler.

        Args:
            latents: of one sample each, (B, ...), or as the model takes them, guidance included.

        Raises:
            RecordError: no run is open, or the latents are no tensor.
        """
        of_kind("latents", latents, Tensor, RecordError)
        if not self.calls or len(self.calls) in self.results:
            raise RecordError(
                "finish",
                expected="calls of the model before it",
                got="none since the last result",
                fix="Call it once after every whole run of the sampler.",
            )
        self._grown_results[len(self.calls)] = _detached(latents, None)
        self._forget_derived()

    def _asks_again(self, first: CallSignature, flat: FlatCall) -> bool:
        """Whether a call differs from the last one in tensors of other sizes alone."""
        now, last = flat.signature(), self.calls[-1]
        if first.constants != now.constants or first.order != now.order:
            return False
        before = {spec.name: spec for spec in first.tensors}
        same = [spec.name for spec in now.tensors if spec == before[spec.name]]
        kinds = {(before[spec.name].dtype, spec.dtype) for spec in now.tensors}
        return (
            bool(same)
            and all(one == other for one, other in kinds)
            and all(torch.equal(flat.tensors[name].detach().cpu(), last[name]) for name in same)
        )

    def _leave_out(self, first: CallSignature, now: CallSignature) -> None:
        if not self.left_out:
            name, expected, got = first.difference(now)
            warnings.warn(
                f"Calls of another size are left out of the recording: {name} was {expected}, and "
                f"is {got} where the step is asked for again. The optimised model captures them "
                "when they come, with the same factors; the sampler's update cannot be told from "
                "the others alone.",
                CalicacheWarning,
                stacklevel=2,
            )
        self.left_out += 1

    def _forget_derived(self) -> None:
        """Runs, classes and the timestep are computed again from what has been added."""
        for name in DERIVED:
            vars(self).pop(name, None)


@contextmanager
def record(model: nn.Module) -> Iterator[Recorder]:
    """Keep inputs and output of every call of `model` made inside the `with` block.

    Args:
        model: the denoiser that the user's sampler or pipeline calls.

    Yields:
        A recording that grows with every call.

    Examples:
        >>> with record(pipe.transformer) as recording:
        ...     recording.finish(pipe(class_labels=[1, 2], output_type="latent").images)

    Raises:
        RecordError: what is given is no model.
    """
    of_kind("model", model, nn.Module, RecordError)
    recorder, places = Recorder(), list[int | None]()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places.append(recorder.append(module, args, kwargs))

    def answer(_: nn.Module, __: tuple[Any, ...], returned: Any) -> None:
        place = places.pop()
        if place is not None:
            recorder.answer(place, returned)

    before = model.register_forward_pre_hook(keep, with_kwargs=True)
    after = model.register_forward_hook(answer)
    try:
        yield recorder
    finally:
        before.remove()
        after.remove()


def _detached(value: Tensor, last: Tensor | None) -> Tensor:
    """A copy on the CPU; the last call's own where it is equal."""
    if _unusable(value):
        raise RecordError(
            "argument",
            expected="tensors with values, neither sparse nor nested",
            got="one on the meta device" if value.is_meta else f"one of layout {value.layout}",
            fix="Pass dense tensors.",
        )
    copy = value.detach().to("cpu", copy=True)
    return last if last is not None and torch.equal(copy, last) else copy


def _unusable(value: Tensor) -> bool:
    """Whether a tensor has no values of its own, or not one beside the other."""
    return value.is_meta or value.layout is not torch.strided or value.is_nested


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
