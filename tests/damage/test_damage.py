"""Damaged and crafted files of every format are refused in words, or as good as they were.

`make damage N=2000` tries more; a seed that fails there becomes a line in FOUND.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from damage.formats import FORMATS
from damage.trial import Original, make_original, outcome_of

pytestmark = pytest.mark.slow

CASES = 34  # of each format: some three hundred in all

# Seeds that failed once, by format.
FOUND: dict[str, tuple[int, ...]] = {}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A fork has none of the threads of its parent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(FORMATS))
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return make_original(request.param, tmp_path_factory.mktemp("damage"))


def test_what_was_changed_is_refused_or_makes_no_difference(original: Original) -> None:
    outcomes: Counter[str] = Counter()
    for seed in (*range(CASES), *FOUND.get(original.format, ())):
        outcome = outcome_of(original, seed)
        assert outcome.right, f"{original.format}, seed {seed}: {outcome}"
        outcomes[outcome.words] += 1
    assert outcomes["refused"] > CASES / 2  # otherwise hardly anything was changed
