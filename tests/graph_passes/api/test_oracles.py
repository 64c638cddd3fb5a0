"""The paper's formulas in plain NumPy, on hooked nn.Linear layers, against our factors."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import pytest
from model import FashionDiT
from support.factors import factors_of
from support.models import STEPS, sample_dit
from torch import nn

from calicache.graph_passes import (
    CapturedGraph,
    Recording,
    Sites,
    find_sites,
    record,
    uniform_schedule,
)
from calicache.graph_passes.factors.decompose import CalibrationFactors
from calicache.graph_passes.factors.observe import observe
from calicache.graph_passes.graph.capture import capture
from calicache.graph_passes.graph.dependence import classify_nodes
from calicache.graph_passes.settings.choices import Weighting
from calicache.graph_passes.sites.targets import assign

LAYERS = [
    f"blocks.{block}.{layer}"
    for block in (0, 1)
    for layer in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")
]
RANKS = (1, 4, 17, 32)
# The paper's; COVARIANCE has its own oracle in test_covariance.py and test_observe.py.
PAPER = (Weighting.NONE, Weighting.ACTIVATION, Weighting.INCREMENT)

# One replay gives, per layer, the float64 inputs and outputs (B, N, C) of all steps in order.
Replay = dict[str, list[tuple[np.ndarray, np.ndarray]]]


@pytest.fixture(scope="module")
def two_runs(dit: FashionDiT) -> Recording:
    with record(dit) as recording:
        sample_dit(dit, seed=1)
        sample_dit(dit, seed=2)
    return recording


@pytest.fixture(scope="module")
def replay(dit: FashionDiT, two_runs: Recording) -> Replay:
    seen: Replay = {name: [] for name in LAYERS}
    handles = []
    for name in LAYERS:
        layer = dit.get_submodule(name)
        assert isinstance(layer, nn.Linear)

        def keep(_layer, args, output, name=name):
            x, y = args[0].detach().numpy(), output.detach().numpy()
            seen[name].append((x.astype(np.float64), y.astype(np.float64)))

        handles.append(layer.register_forward_hook(keep))
    for call in two_runs.calls:
        dit(**call)
    for handle in handles:
        handle.remove()
    return seen


def paper_scale(values: list[np.ndarray]) -> np.ndarray:
    """l or c (C,) from values (B, N, C) of many steps: DESIGN.md, section 1."""
    per_sample = []
    for batch in values:
        for sample in batch:
            magnitude = np.abs(sample).mean(axis=0)
            low, high = magnitude.min(), magnitude.max()
            per_sample.append((magnitude - low) / (high - low + 1e-6))
    scale = np.sqrt(np.mean(per_sample, axis=0))
    return np.maximum(scale, scale.max() / 1000) + 1e-6


def paper_scales(
    weighting: Weighting, values: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """(l, c) of one layer: of outputs and of inputs."""
    if weighting is Weighting.NONE:
        return np.ones(values[0][1].shape[-1]), np.ones(values[0][0].shape[-1])
    if weighting is Weighting.INCREMENT:
        runs = values[:STEPS], values[STEPS:]
        values = [
            (x - x_before, y - y_before)
            for run in runs
            for (x_before, y_before), (x, y) in pairwise(run)
        ]
    return paper_scale([y for _, y in values]), paper_scale([x for x, _ in values])


def paper_map(weight: np.ndarray, left: np.ndarray, right: np.ndarray, rank: int) -> np.ndarray:
    """W_r = diag(1/l) U_r S_r V_r^T diag(1/c), with U S V^T = diag(l) W diag(c)."""
    u, s, vt = np.linalg.svd(left[:, None] * weight * right, full_matrices=False)
    return (u[:, :rank] * s[:rank] / left[:, None]) @ (vt[:rank] / right)


def canonical(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The top `rank` columns of U, singular values, and columns of V."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vt[:rank].T


def product(factors: CalibrationFactors) -> np.ndarray:
    return factors.up.double().numpy() @ factors.down.double().numpy()


@dataclass(frozen=True, slots=True)
class Pair:
    """One layer at one rank: the oracle's map and scales, and our map."""

    expected: np.ndarray
    got: np.ndarray
    left: np.ndarray
    right: np.ndarray


@pytest.fixture(scope="module", params=PAPER)
def weighting(request: pytest.FixtureRequest) -> Weighting:
    return request.param


@pytest.fixture(scope="module")
def graph_and_sites(dit: FashionDiT, two_runs: Recording) -> tuple[CapturedGraph, Sites]:
    captured = capture(dit, two_runs.signature)
    return captured, find_sites(captured, classify_nodes(captured, two_runs.dependence))


@pytest.fixture(scope="module")
def pairs(
    dit: FashionDiT,
    two_runs: Recording,
    graph_and_sites: tuple[CapturedGraph, Sites],
    replay: Replay,
    weighting: Weighting,
) -> dict[tuple[str, int], Pair]:
    captured, sites = graph_and_sites
    targets = {rank: assign(captured, sites, rank=rank)[0] for rank in RANKS}
    schedule = uniform_schedule(STEPS, 3)
    statistics = observe(captured, targets[1], two_runs, weighting, schedule)
    ours = {rank: factors_of(captured, targets[rank], statistics) for rank in RANKS}
    result = {}
    for name in LAYERS:
        weight = dit.get_submodule(name).weight.double().numpy()
        left, right = paper_scales(weighting, replay[name])
        for rank in RANKS:
            expected = paper_map(weight, left, right, rank)
            result[name, rank] = Pair(expected, product(ours[rank][name]), left, right)
    return result


@pytest.mark.slow
def test_all_layers_are_sites(graph_and_sites: tuple[CapturedGraph, Sites]) -> None:
    assert [site.name for site in graph_and_sites[1].linears] == LAYERS


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", LAYERS)
def test_low_rank_map_is_the_papers(
    pairs: dict[tuple[str, int], Pair], name: str, rank: int
) -> None:
    pair = pairs[name, rank]
    # Statistics and factors are rounded to float32 (6e-8 of the largest entry each) and the
    # two factors' products add up over r; relative to the map's largest entry, as its small
    # entries are sums that cancel.
    atol = 3e-6 * np.abs(pair.expected).max()
    np.testing.assert_allclose(pair.got, pair.expected, rtol=0, atol=atol)


@pytest.mark.parametrize("space", ["plain", "weighted"])
@pytest.mark.parametrize("rank", RANKS)
def test_factors_are_the_papers_up_to_sign(
    pairs: dict[tuple[str, int], Pair], rank: int, space: str
) -> None:
    compared = 0
    for name in LAYERS:
        pair = pairs[name, rank]
        weighted = space == "weighted"  # there, the paper's U_r, S_r and V_r come back
        left, right = (pair.left[:, None], pair.right) if weighted else (1.0, 1.0)
        u, s, v = canonical(left * pair.expected * right, rank)
        got_u, got_s, got_v = canonical(left * pair.got * right, rank)
        # Singular values move by no more than the map does: float32 rounding.
        np.testing.assert_allclose(got_s, s, rtol=0, atol=3e-6 * s[0])
        distance = np.abs(np.subtract.outer(s, np.append(s, 0.0))) / s[0]
        np.fill_diagonal(distance, 1.0)
        separated = distance.min(axis=1) > 1e-2
        sign = np.sign((got_u * u).sum(axis=0))
        # A vector turns by rounding / gap: 1e-6 / 1e-2 at the closest pair left.
        np.testing.assert_allclose((sign * got_u)[:, separated], u[:, separated], rtol=0, atol=1e-4)
        np.testing.assert_allclose((sign * got_v)[:, separated], v[:, separated], rtol=0, atol=1e-4)
        compared += int(separated.sum())
    assert compared >= 0.6 * rank * len(LAYERS)


def test_oracle_tells_the_weightings_apart(dit: FashionDiT, replay: Replay) -> None:
    # Otherwise the comparisons above would hold for any statistics.
    for name in LAYERS:
        weight = dit.get_submodule(name).weight.double().numpy()
        maps = [paper_map(weight, *paper_scales(w, replay[name]), 4) for w in PAPER]
        for one, other in combinations(maps, 2):
            assert np.abs(one - other).max() > 1e-3 * np.abs(one).max()
