"""Another run of the sample model."""

from __future__ import annotations

import pytest
from model import FashionDiT
from support.models import sample_dit

from calicache.graph_passes import (
    Recording,
    record,
)


@pytest.fixture(scope="module")
def second_run(dit: FashionDiT) -> Recording:
    with record(dit) as recording:
        sample_dit(dit, seed=2)
    return recording
