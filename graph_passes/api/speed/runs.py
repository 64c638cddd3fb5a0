"""The runs that a pipeline is sped up from: requests as they were given, recorded and timed."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.graph_passes.api.speed.eager import wait
from calicache.graph_passes.api.speed.subject import Request, Run, Subject
from calicache.graph_passes.common.disk.hashing import digest
from calicache.graph_passes.common.errors import DependenceError, RecordError
from calicache.graph_passes.common.progress import Meter
from calicache.graph_passes.recording.input_classes import Dependence
from calicache.graph_passes.recording.recorder import record
from calicache.graph_passes.recording.recording import Recording
from calicache.graph_passes.recording.signature import flatten_call
from calicache.graph_passes.search.ground import LEAST_RUNS

STEPS = "num_inference_steps"


@dataclass(frozen=True, slots=True)
class KeywordCall:
    """A call of a pipeline by keywords, up to the latents, with random numbers of its own.

    Attributes:
        keywords: as they were given.
        turn: how often they were run before; other turns have other noise.
    """

    keywords: Mapping[str, Any]
    turn: int

    def __call__(self, pipe: Any) -> Any:
        """Run the pipeline."""
        known = inspect.signature(pipe.__call__).parameters
        given = dict(self.keywords)
        if "output_type" in known:
            given["output_type"] = "latent"  # what is compared, and nothing is decoded for it
        if "generator" in known:
            given["generator"] = self._generator(given.get("generator"))
        return pipe(**given)

    def _generator(self, given: Any) -> Any:
        """New ones from the seeds of those given, which stay as they are."""
        if isinstance(given, list | tuple):
            return [self._generator(one) for one in given]
        if given is None:
            return torch.Generator().manual_seed(self.turn)
        seed = (given.initial_seed() + self.turn) % 2**63
        return torch.Generator(given.device).manual_seed(seed)


def requests_of(subject: Subject, calls: Any) -> list[Request]:
    """The runs to record: all calls that were given, over and over until they are enough.

    Args:
        subject: what is called.
        calls: one keyword dictionary or function, or several.

    Raises:
        RecordError: none, or something that can neither be called nor called with.
    """
    given = list(calls) if isinstance(calls, list | tuple) else [calls]
    for call in given:
        keywords = isinstance(call, Mapping) and subject.is_pipeline
        if not (keywords or callable(call)):
            raise RecordError(
                "calls",
                expected="keyword dictionaries of the pipeline's call, or functions of the pipeline"
                if subject.is_pipeline
                else "functions that sample with the model they are given",
                got=f"a value of the class {type(call).__name__}",
                fix="Give one such call, or several with other prompts.",
            )
    if not given:
        raise RecordError(
            "calls", expected="one call or more", got="none", fix="Give the calls to be fast."
        )
    count = max(LEAST_RUNS, len(given))
    return [
        KeywordCall(call, number // len(given)) if isinstance(call, Mapping) else call
        for number, call in enumerate(islice(cycle(given), count))
    ]


def longer_requests(subject: Subject, requests: Sequence[Request], steps: int) -> list[Request]:
    """The same requests in another number of steps, with the same noise.

    Raises:
        RecordError: one is a function, whose steps are its own, or has as many steps already; or
            several models share a run, and other steps would end between them.
    """
    if len(subject.plain) > 1:
        raise RecordError(
            "reference_steps",
            expected="a pipeline of one transformer",
            got=" and ".join(subject.plain),
            fix="Leave it out: where one model hands on to the next depends on the steps.",
        )
    longer: list[Request] = []
    for request in requests:
        own = request.keywords.get(STEPS) if isinstance(request, KeywordCall) else None
        if not isinstance(request, KeywordCall) or not isinstance(own, int) or own >= steps:
            raise RecordError(
                "reference_steps",
                expected=f"keyword dictionaries with {STEPS}, and more steps than they have",
                got=f"{steps} for a call of {own} steps" if own else "a call without it",
                fix=f"Give calls such as {{'prompt': ..., '{STEPS}': 20}}, or record a reference "
                "yourself and give it to Plan.search.",
            )
        longer.append(replace(request, keywords={**request.keywords, STEPS: steps}))
    return longer


def record_parts(
    subject: Subject, requests: Sequence[Request], meter: Meter
) -> dict[str, Recording]:
    """Run the requests with the plain models; the recordings of those that were called.

    Raises:
        RecordError: two runs are the same, so that none would be left to choose or report with.
    """
    finals: list[Tensor] = []
    with ExitStack() as stack:
        recorders = {n: stack.enter_context(record(model)) for n, model in subject.plain.items()}
        for number, request in enumerate(requests):
            run = subject.run(request, subject.plain, number)
            for name, latents in run.latents.items():
                recorders[name].finish(latents)
            if run.final is not None:
                finals.append(run.final)
            meter.add()
    for number, final in enumerate(finals):
        if any(torch.equal(final, other) for other in finals[:number]):
            raise RecordError(
                "calls",
                expected="runs with other noise or other prompts",
                got=f"run {number} the same as an earlier one",
                fix="Leave the seed to speed_up, or give calls with other seeds.",
            )
    return {name: recorder for name, recorder in recorders.items() if recorder.calls}


def fingerprint(subject: Subject, request: Request) -> str:
    """A digest of what the sampler does to a model: timesteps, sizes, guidance, its update.

    The request is run with random numbers in the place of the models' answers, so that each model
    is called once. Prompts and seeds of keyword calls make no difference.
    """
    if isinstance(request, KeywordCall):
        keywords = {k: v for k, v in request.keywords.items() if k != "generator"}
        request = replace(request, keywords=keywords)
    with ExitStack() as stack:
        recorders = {}
        for name, model in subject.plain.items():
            stack.enter_context(_answered(model))
            recorders[name] = stack.enter_context(record(model))
        subject.run(request, subject.plain, 0)
    sha = hashlib.sha256()
    for name, recorder in recorders.items():
        for part in _moving(recorder) if recorder.calls else ():
            sha.update(f"{name} {part};".encode())
    return sha.hexdigest()


def _moving(recording: Recording) -> Iterator[str]:
    """The form of the calls, and digests of what changes over the steps."""
    yield str(recording.signature)
    try:
        names = [n for n, kind in recording.dependence.items() if kind > Dependence.RUN]
    except DependenceError:  # one step alone
        names = [spec.name for spec in recording.signature.tensors]
    for call in recording.calls:
        yield from (digest(call[name]) for name in names)


@contextmanager
def _answered(model: nn.Module) -> Iterator[None]:
    """Let a model answer with random numbers in the form of its first answer."""
    forward, own = model.forward, vars(model).get("forward")
    draw = torch.Generator().manual_seed(0)
    answers: dict[str, Any] = {}

    def noise(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return torch.randn(value.shape, generator=draw).to(value)

    @wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        form = str(flatten_call(model, args, kwargs).signature())
        if form not in answers:
            answers[form] = forward(*args, **kwargs)
        return pytree.tree_map(noise, answers[form])

    model.forward = answer
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@dataclass(frozen=True, slots=True)
class RunTimes:
    """One run timed with the plain models and with the optimised ones.

    Attributes:
        plain, fast: seconds.
        error: relative L2 error of the final latents, mean over samples; None where they are not
            seen, or where the request does not give the same run twice.
    """

    plain: float
    fast: float
    error: float | None


def time_runs(
    subject: Subject, request: Request, seed: int, models: Mapping[str, nn.Module]
) -> RunTimes:
    """Time a request; the optimised models run twice, and the first time is a warm-up.

    Args:
        subject: a pipeline or a model.
        request: what is run.
        seed: of its random numbers.
        models: the optimised ones; parts without one run plainly.
    """
    fast = {**subject.plain, **models}
    _timed(subject, request, seed, fast)
    before, plain = _timed(subject, request, seed, subject.plain)
    after, quick = _timed(subject, request, seed, fast)
    return RunTimes(plain, quick, _error(before, after))


def _timed(
    subject: Subject, request: Request, seed: int, models: Mapping[str, nn.Module]
) -> tuple[Run, float]:
    start = time.perf_counter()
    run = subject.run(request, models, seed)
    wait()
    return run, time.perf_counter() - start


def _error(before: Run, after: Run) -> float | None:
    pairs = zip(before.first, after.first, strict=False)
    same = len(before.first) == len(after.first) and all(torch.equal(*pair) for pair in pairs)
    if before.final is None or after.final is None or not same:
        return None
    full, got = (run.double().flatten(1) for run in (before.final, after.final))
    return float(((got - full).norm(dim=1) / full.norm(dim=1)).mean())
