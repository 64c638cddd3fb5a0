"""speed_up: from a pipeline and some calls to the same pipeline, faster, in one line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from calicache.graph_passes.api.optimize import optimize
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.api.speed.eager import runtime_of
from calicache.graph_passes.api.speed.planning import Stages, Task
from calicache.graph_passes.api.speed.runs import fingerprint, longer_requests, requests_of
from calicache.graph_passes.api.speed.store import Kept, Store
from calicache.graph_passes.api.speed.subject import Request, Subject
from calicache.graph_passes.api.speed.summary import Summary
from calicache.graph_passes.common.arguments import whole_number
from calicache.graph_passes.common.disk.bounds import MAX_STEPS
from calicache.graph_passes.common.disk.hashing import hash_weights
from calicache.graph_passes.common.environment import environment
from calicache.graph_passes.common.errors import CalicacheError, PlanError
from calicache.graph_passes.common.progress import OnProgress
from calicache.graph_passes.settings.request import SearchRequest

USUAL_BUDGET = 0.4
PLANS = user_cache_path("calicache", appauthor=False) / "plans"


def speed_up(
    pipe: Any,
    calls: Any,
    *,
    budget: float | None = None,
    max_error: float | None = None,
    effort: int = 1,
    reference_steps: int | None = None,
    cache: Path | str | None = PLANS,
    on_progress: OnProgress | None = None,
) -> Summary:
    """Make a pipeline fast, measured on its own calls: record, probe, search, put in place.

    Costs are seconds of eager PyTorch on this machine, from a short probe. Where the search cannot
    see the sampler or the model, the plan is an even one of forecasts, and the summary says why.
    Where nothing is faster here, everything is left as it was. A model given by itself is left
    alone in any case: the fast one is `model` of the summary.

    Args:
        pipe: a diffusers pipeline, whose `transformer` (and `transformer_2`) are sped up; or a
            model in eval mode.
        calls: what is to be fast, with the sizes, steps and guidance of later use: keyword
            dictionaries of the pipeline's call, or functions of the pipeline or model, which for a
            model return the final latents. Fewer than three are run three times in all with other
            noise; more prompts make a better plan.
        budget: share of the plain run's seconds, above 0 and below 1; 0.4 where neither is given.
        max_error: of the final latents, that 99 % of new samples stay below; in its place.
        effort: 1 or more; of the search.
        reference_steps: of runs of the same calls that the plan aims at, three times as many as
            they have or more: it is then nearer to the exact result, and errors of held-out runs
            are against these. The calls have `num_inference_steps`. None aims at the plain runs.
        cache: folder where plans are kept, and an interrupted search goes on; None keeps nothing.
            To find a plan there the first call is run with noise as the answers of the models.
        on_progress: told how far it is.

    Raises:
        CalicacheError: the wish cannot be met, or a stage refuses; `pipe` is as it was.
    """
    subject = Subject.of(pipe)
    if budget is None and max_error is None:
        budget = USUAL_BUDGET
    request = SearchRequest(budget, max_error, None, effort, ("*",), ())
    requests, store = requests_of(subject, calls), Store.of(cache)
    longer: list[Request] = []
    if reference_steps is not None:
        steps = whole_number("reference_steps", reference_steps, PlanError, 1, MAX_STEPS)
        longer = longer_requests(subject, requests, steps)
    key = "" if store.folder is None else plan_key(subject, requests, request, reference_steps)
    kept = store.load(key)
    models = None if kept is None else _optimized(store, key, subject, kept)
    searched = kept is None or models is None
    if kept is None or models is None:
        with store.working(key) as work:
            stages = Stages(on_progress)
            kept, models = Task(subject, requests, request, work, stages, longer).run()
            store.save(key, kept)
    promise = kept.promise
    if promise.left:
        models = {}
    if subject.is_pipeline:
        subject.place({**subject.plain, **models})
    values = {field.name: getattr(promise, field.name) for field in fields(promise)}
    return Summary(
        **values,
        searched=searched,
        folder=store.place(key),
        models={**subject.plain, **models},
    )


def plan_key(
    subject: Subject,
    requests: Sequence[Request],
    request: SearchRequest,
    reference_steps: int | None = None,
) -> str:
    """What plans depend on: weights, sampler and its timesteps, what was asked for, the machine."""
    scheduler = subject.scheduler
    parts = {
        "calicache": version("calicache"),
        "models": {n: [type(m).__name__, hash_weights(m)] for n, m in subject.plain.items()},
        "runtime": sorted({runtime_of(model) for model in subject.plain.values()}),
        "environment": environment(),
        "scheduler": [type(scheduler).__name__, dict(getattr(scheduler, "config", {}))],
        "sampler": fingerprint(subject, requests[0]),
        "request": [request.text, request.effort, len(requests), reference_steps],
    }
    text = json.dumps(parts, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _optimized(
    store: Store, key: str, subject: Subject, kept: Kept
) -> dict[str, OptimizedModel] | None:
    """The models under plans that were kept; None where these do not fit."""
    try:
        for name in kept.plans.keys() - subject.plain.keys():
            raise PlanError(
                "part", expected=f"one of {', '.join(subject.plain)}", got=name, fix="Delete it."
            )
        return {name: optimize(subject.plain[name], plan) for name, plan in kept.plans.items()}
    except CalicacheError as error:
        store.drop(key, error)
        return None
