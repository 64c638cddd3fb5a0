"""Random cases: a model, a sampler and two plans, and what becomes of them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from support.models import relative
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calicache.export import Session, export_onnx
from calicache.graph_passes import (
    OptimizedModel,
    Plan,
    Recording,
    Weighting,
    optimize,
    record,
)
from calicache.graph_passes.common.errors import CalicacheError
from calicache.graph_passes.settings.choices import BranchKind
from random_models.mixers import MIXERS, WIDTH, WITHOUT_TOKENS
from random_models.models import (
    JOINS,
    LAYOUTS,
    MODULATIONS,
    NORMS,
    RESULTS,
    TIMES,
    BlockSpec,
    ModelSpec,
    call_of,
    noise,
    random_model,
)

STEPS = 6
FULL_RANK = 4 * WIDTH
DTYPES = ("float32", "float32", "float64", "float16", "bfloat16")  # the usual one more often
# Relative L2. float64 and float32 round at 2e-16 and 1e-7; the weights of an anchor reach 15, and
# what they make of rounding goes through up to four blocks. Half precision rounds at 5e-4 (bfloat16
# at 4e-3) and the anchors are of order 0 there.
BOUNDS = {"float64": 1e-11, "float32": 2e-3, "float16": 5e-2, "bfloat16": 0.3}
# ONNX has the epsilon of a norm as a float32 number: off by 1e-8 of itself, beside small variances.
EXPORTED_BOUNDS = BOUNDS | {"float64": 1e-8}
# Where the last bit of a value differs, its increment falls to the other side of a tie between two
# of 127 levels.
INT8_BOUND = 2e-2


@dataclass(frozen=True)
class Case:
    """What is tried.

    Attributes:
        model: its spec.
        dtype: of the model.
        batch: samples.
        calls: of the model in a step.
        exact: schedule in letters, R and C alone, of the plan at full rank.
        schedule: of the plan that is exported.
        rank: of that.
        order, weighting: of both.
        correct: whether output weights are fitted to the sampler.
        branch: kind of the calibration branches of the exported plan, where that is planned anew.
    """

    model: ModelSpec
    dtype: str
    batch: int
    calls: int
    exact: str
    schedule: str
    rank: int
    order: int
    weighting: str
    correct: bool
    branch: str


def case_of(seed: int) -> Case:
    """The case of a seed: everything is drawn evenly, so that no two are near each other."""
    draw = random.Random(seed)
    model = _drawn_model(draw)
    return Case(
        model=model,
        dtype=draw.choice(DTYPES),
        batch=draw.choice((1, 2)),
        calls=draw.choice((1, 1, 2, 3)),
        exact=_drawn_schedule(draw, "RC"),
        schedule=_drawn_schedule(draw, "RCUF"),
        rank=draw.randint(0, WIDTH),
        order=draw.choice((0, 1, 2)),
        weighting=draw.choice(list(Weighting)).value,
        correct=draw.choice((False, True)),
        branch=draw.choice(("low_rank", "low_rank", "int8")),
    )


def _drawn_model(draw: random.Random) -> ModelSpec:
    layout = draw.choice(LAYOUTS)
    mixers = WITHOUT_TOKENS if layout == "vector" else tuple(MIXERS)
    blocks = tuple(
        BlockSpec(
            mixer=draw.choice(mixers),
            second=draw.choice(mixers),
            norm=draw.choice(NORMS),
            modulation=draw.choice(MODULATIONS),
            join=draw.choice(JOINS),
        )
        for _ in range(draw.choice((1, 2, 3)))
    )
    return ModelSpec(
        blocks=blocks,
        layout=layout,
        rope=draw.choice(("none", "real", "complex")),
        time=draw.choice(TIMES),
        result=draw.choice(RESULTS),
        skips=draw.choice((False, True)),
        shared=draw.choice((False, True)),
        tied=draw.choice((False, True)),
        seed=draw.randrange(1000),
    )


def _drawn_schedule(draw: random.Random, letters: str) -> str:
    return "R" + "".join(draw.choices(letters, k=STEPS - 1))


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        exact: `equal`, or the stage that refused the plan at full rank, and why.
        exported: `equal`, or the stage that refused the export.
    """

    exact: str
    exported: str


class Different(AssertionError):  # noqa: N818 - what was found
    """A model that is not what it has to be."""


def outcome_of(case: Case) -> Outcome:
    """Record, plan, optimise, compare; export, run, compare.

    Raises:
        Different: a result is off by more than rounding.
        Exception: anything but a CalicacheError is a defect too.
    """
    model = random_model(case.model).to(getattr(torch, case.dtype))
    order = case.order if case.dtype in ("float32", "float64") else 0
    try:
        recording = _recorded(case, model)
        plan = Plan.from_trajectory(
            model,
            recording,
            schedule=case.exact,
            rank=FULL_RANK,
            order=order,
            weighting=case.weighting,
            correct=False,
        )
        got = _outputs(optimize(model, plan), recording)
    except CalicacheError as refusal:
        return Outcome(_reason(refusal), "not tried")
    _compare("full rank", BOUNDS[case.dtype], got, _outputs(model, recording))
    try:
        if case.correct:
            plan = Plan.from_trajectory(
                model,
                recording,
                schedule=case.schedule,
                rank=case.rank,
                order=order,
                branch=case.branch,
                workspace=plan.workspace,
            )
        else:
            plan = plan.with_schedule(case.schedule).with_rank(case.rank)
        fast = optimize(model, plan)
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(fast, Path(folder) / "d")
            session = Session(Path(folder) / "d")
            exported = _stepped(session, recording)
    except CalicacheError as refusal:
        return Outcome("equal", _reason(refusal))
    bound = EXPORTED_BOUNDS[case.dtype]
    bound = max(bound, INT8_BOUND) if plan.recipe.branch is BranchKind.INT8 else bound
    _compare("exported", bound, exported, _outputs(fast, recording))
    return Outcome("equal", "equal")


def _recorded(case: Case, model: nn.Module) -> Recording:
    """A run of Euler's method, guided by the mean of all calls of a step."""
    x = noise(case.model, case.batch, getattr(torch, case.dtype))
    with record(model) as recording, torch.no_grad():
        for step in range(STEPS):
            results = [
                pytree.tree_leaves(model(**call_of(case.model, x, step, part)))[0]
                for part in range(case.calls)
            ]
            first, *others = results
            x = x - 0.2 * (first + 0.5 * sum((first - other for other in others), 0 * first))
        recording.finish(x)
    return recording


def _outputs(model: nn.Module, recording: Recording) -> list[list[Tensor]]:
    if isinstance(model, OptimizedModel):
        model.reset()
    with torch.no_grad():
        return [pytree.tree_leaves(model(**call)) for call in recording.calls]


def _stepped(session: Session, recording: Recording) -> list[list[Tensor]]:
    beside = recording.calls_per_step
    return [
        [
            torch.from_numpy(value)
            for value in session.step_outputs(number // beside, number % beside, **call)
        ]
        for number, call in enumerate(recording.calls)
    ]


def _compare(
    what: str, bound: float, got: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]
) -> None:
    for number, (some, others) in enumerate(zip(got, expected, strict=True)):
        for value, other in zip(some, others, strict=True):
            off = relative(value.double(), other.double())
            if value.dtype != other.dtype or not off <= bound:
                raise Different(f"{what}: call {number} is off by {off:.2g}, {value.dtype}")


def _reason(refusal: CalicacheError) -> str:
    """The stage and what it is about, without names and numbers of a single model."""
    got = refusal.got.split(":")[0][:60]
    return f"{refusal.stage}: {refusal.where.split(' ')[0]}: {got}"
