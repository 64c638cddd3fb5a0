"""The trained sample, for tests of what an error is worth."""

from __future__ import annotations

import pytest
from model import FashionDiT
from weights import DIT_WEIGHTS, load_weights


@pytest.fixture(scope="session")
def model() -> FashionDiT:
    """What an error is worth shows on a trained model alone."""
    return load_weights(FashionDiT(), DIT_WEIGHTS)
