"""Cache folding: where to keep z_ref = A x_ref (rank r) instead of x_ref (in channels).

Only A x_ref is ever used, so y = y_ref + B (A x - z_ref) is the same map with a smaller cache
and a subtraction over r instead of `in` channels. It costs one thin GEMM on a REFRESH step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from calicache.graph_passes.plan import StepMode
from calicache.graph_passes.sites import LinearSite, Sites

# Floating-point operations of a float32 GEMM in the time one byte of memory moves. Measured
# on two server cores: about 180 GFLOP/s against 18 GB/s. Only the order of magnitude matters.
FLOPS_PER_BYTE = 10.0


def choose_folds(
    sites: Sites, ranks: Mapping[str, int], schedule: Sequence[StepMode], itemsize: int
) -> frozenset[str]:
    """Names of the sites to fold; siblings share x_ref and so fold together.

    Per token and interval, folding a group adds 2 (sum of r) in operations on REFRESH, and
    saves on every CALIBRATE step a subtraction that moves 3 in values.

    Args:
        sites: all sites and their sibling groups.
        ranks: r by site name.
        schedule: mode of every step.
        itemsize: bytes of one cached value.
    """
    cheap = schedule.count(StepMode.CALIBRATE) / schedule.count(StepMode.REFRESH)
    saved = cheap * 3 * itemsize * FLOPS_PER_BYTE
    folded: set[str] = set()
    for group in sites.groups:
        rank = sum(ranks[name] for name in group.sites)
        if 0 < 2 * rank < saved and rank <= _channels(sites.linears, group.sites[0]):
            folded |= set(group.sites)
    return frozenset(folded)


def _channels(linears: Sequence[LinearSite], name: str) -> int:
    return next(site.in_features for site in linears if site.name == name)
