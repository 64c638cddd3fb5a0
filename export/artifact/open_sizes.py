"""Sizes that an artifact leaves open, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from math import lcm
from typing import Annotated

from pydantic import Field

from calicache.graph_passes.common.disk.bounds import Count

Factor = Annotated[int, Field(ge=-(2**40), le=2**40)]


class Axis(StrEnum):
    """What can be left open.

    BATCH counts samples, PROMPT the tokens of the text, TOKENS those of a latent (B, tokens, C).
    """

    BATCH = "batch"
    PROMPT = "prompt"
    TOKENS = "tokens"


Sizes = Mapping[Axis, int]
"""How large every open size is in one run."""


@dataclass(frozen=True, slots=True)
class SizeFormula:
    """A size in terms of the open ones: 2*batch, prompt + tokens, batch*tokens/4.

    It is (constant + Σ factors[axis] · size of the axis) / divisor, times the batch where it grows
    with that.

    Attributes:
        per_sample: whether it grows with the batch.
        constant: the part that stays the same.
        factors: how often every axis but the batch counts.
        divisor: of the whole.
    """

    per_sample: bool
    constant: Factor
    factors: dict[Axis, Factor]
    divisor: Annotated[int, Field(ge=1, le=2**40)] = 1

    def at(self, sizes: Sizes) -> int:
        """The size where the open ones are these; a fraction is rounded down."""
        return self._share(sizes) * (sizes[Axis.BATCH] if self.per_sample else 1) // self.divisor

    def solved(self, size: int, known: Sizes) -> int | None:
        """The only axis that is not known yet, from the size; None where no whole number fits.

        Args:
            size: that the formula gives.
            known: all of its axes but one.
        """
        (axis,) = self.axes - known.keys()
        scaled = size * self.divisor
        if axis is Axis.BATCH:
            return _quotient(scaled, self._share(known))
        share = _quotient(scaled, known[Axis.BATCH]) if self.per_sample else scaled
        rest = self._share({**known, axis: 0})
        return None if share is None else _quotient(share - rest, self.factors[axis])

    @property
    def axes(self) -> frozenset[Axis]:
        """What it depends on."""
        return frozenset(self.factors) | ({Axis.BATCH} if self.per_sample else set())

    def _share(self, sizes: Sizes) -> int:
        return self.constant + sum(n * sizes[axis] for axis, n in self.factors.items())

    def __str__(self) -> str:
        terms = [_product(factor, axis) for axis, factor in self.factors.items()]
        if not terms and self.per_sample:
            text = _product(self.constant, Axis.BATCH)
        else:
            terms += [str(self.constant)] if self.constant else []
            text = " + ".join(terms).replace("+ -", "- ")
            in_brackets = len(terms) > 1 and (self.per_sample or self.divisor > 1)
            text = f"({text})" if in_brackets else text
            text = f"{Axis.BATCH}*{text}" if self.per_sample else text
        return text if self.divisor == 1 else f"{text}/{self.divisor}"


@dataclass(frozen=True, slots=True)
class OpenSize:
    """A dimension of a tensor, and how long it is."""

    dimension: Count
    formula: SizeFormula


def fitted_formula(values: Sequence[int], points: Sequence[Sizes]) -> SizeFormula | None:
    """The formula of a size that is known at several points; None where none gives them all.

    Args:
        values: the size at each point.
        points: the first, for every axis one that differs from it in that axis alone, and for
            axes other than the batch one more, that tells a formula from a chance.
    """
    for per_sample in (False, True) if Axis.BATCH in points[0] else (False,):
        formula = _fitted(values, points, per_sample)
        if all(formula.at(p) == v for v, p in zip(values, points, strict=True)):
            return formula
    return None


def _fitted(values: Sequence[int], points: Sequence[Sizes], per_sample: bool) -> SizeFormula:
    shares = [
        Fraction(value, point[Axis.BATCH] if per_sample else 1)
        for value, point in zip(values, points, strict=True)
    ]
    first, slopes = points[0], {}
    for axis in first.keys() - {Axis.BATCH}:
        moved = next(
            i for i, p in enumerate(points) if {a for a in first if p[a] != first[a]} == {axis}
        )
        slopes[axis] = (shares[moved] - shares[0]) / (points[moved][axis] - first[axis])
    rest = shares[0] - sum(slope * first[axis] for axis, slope in slopes.items())
    divisor = lcm(rest.denominator, *(slope.denominator for slope in slopes.values()))
    factors = {axis: int(slopes[axis] * divisor) for axis in Axis if slopes.get(axis)}
    return SizeFormula(per_sample, int(rest * divisor), factors, divisor)


def _product(factor: int, axis: str) -> str:
    return axis if factor == 1 else f"{factor}*{axis}"


def _quotient(size: int, by: int) -> int | None:
    return size // by if by and size % by == 0 else None
