"""Random models and plans: equal to the plain model at full rank, and exported as they are.

`make fuzz N=5000` tries more of them; a case that fails there becomes a line in FOUND.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from random_models.cases import case_of, outcome_of

pytestmark = pytest.mark.slow

CASES = 5  # five seconds of a core each: most of it torch.export and torch.onnx

# Seeds whose cases failed once, and what was wrong.
FOUND = {
    12: "float64: numbers of operations were float32 in ONNX",
    113: "covariance: narrow siblings at full rank were one map of less than full rank",
}


@pytest.mark.parametrize("seed", FOUND)
def test_cases_that_failed_once_are_equal(seed: int) -> None:
    outcome = outcome_of(case_of(seed))
    assert (outcome.exact, outcome.exported) == ("equal", "equal")


def test_random_models_are_equal_or_refused_in_words() -> None:
    outcomes: Counter[bool] = Counter()

    @settings(
        max_examples=CASES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**32))
    def try_case(seed: int) -> None:
        outcomes[outcome_of(case_of(seed)).exact == "equal"] += 1

    try_case()
    # A refusal is right, but where most cases are refused, nothing is tried.
    assert outcomes[True] > CASES / 2


def test_a_seed_is_a_case() -> None:
    cases = [case_of(seed) for seed in range(50)]
    assert cases == [case_of(seed) for seed in range(50)]
    assert len(set(cases)) == 50
    assert {case.dtype for case in cases} == {"float32", "float64", "float16", "bfloat16"}
