"""A small optimised model without and with kept refreshes, and its graphs as plain data."""

from __future__ import annotations

import pytest
from support.small.graphs import small_model

from calicache.graph_passes import ModelGraphs, OptimizedModel, view_graphs


@pytest.fixture(scope="module", params=[0, 2], ids=["order 0", "order 2"])
def optimized(request: pytest.FixtureRequest) -> OptimizedModel:
    return small_model(request.param)


@pytest.fixture(scope="module")
def graphs(optimized: OptimizedModel) -> ModelGraphs:
    return view_graphs(optimized.compiled.captured, optimized.compiled.variant_set)
