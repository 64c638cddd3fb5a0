"""Work that is shared out over processes, and what they tell one another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.torchrun import torchrun

from calicache.graph_passes.common.errors import PlanError
from calicache.graph_passes.common.ranks import ALONE
from calicache.graph_passes.common.torchrun import tell_once, torchrun_ranks

SCRIPT = Path(__file__).parent / "ranks_at_work.py"


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has got."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(SCRIPT, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_every_item_is_done_by_one_process(by_rank: list[dict[str, Any]]) -> None:
    assert [ranks["share"] for ranks in by_rank] == [[0, 2, 4], [1, 3]]
    assert [ranks["done"] for ranks in by_rank] == [[0, 2, 4], [1, 3]]


def test_results_are_in_the_order_of_the_items_everywhere(by_rank: list[dict[str, Any]]) -> None:
    for ranks in by_rank:
        assert ranks["squares"] == [0, 1, 4, 9, 16]
        assert ranks["first"] == "from 0"
        assert ranks["sum"] == [2.0, 2.0]


def test_what_is_refused_is_refused_everywhere_by_the_first_item(
    by_rank: list[dict[str, Any]],
) -> None:
    assert [ranks["error"] for ranks in by_rank] == ["item 2", "item 2"]


def test_processes_that_do_not_have_the_same_are_told(by_rank: list[dict[str, Any]]) -> None:
    for ranks in by_rank:
        assert "expected the same in all 2 processes" in ranks["difference"]
        assert "got 0 at rank 0, 1 at rank 1" in ranks["difference"]


def test_what_all_have_to_tell_is_told_once_and_what_one_has_is_not_lost(
    by_rank: list[dict[str, Any]],
) -> None:
    told = [text for ranks in by_rank for text in ranks["told"]]
    assert sorted(told) == ["of all", "of rank 0", "of rank 1"]
    assert all(f"of rank {rank}" in ranks["told"] for rank, ranks in enumerate(by_rank))


def test_processes_without_a_store_that_outlives_them_tell_each_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    told: list[str] = []
    for _ in range(2):
        tell_once("of all", told.append)
    assert told == ["of all"] * 2


def test_one_process_alone_has_all_items() -> None:
    with torchrun_ranks() as ranks:
        assert ranks == ALONE
        assert (ranks.rank, ranks.size) == (0, 1)
        assert ranks.share(range(3)) == range(3)
        assert ranks.map(str, range(3)) == ["0", "1", "2"]
        assert ranks.first(lambda: 7) == 7
        assert ranks.gather("x") == ["x"]
        assert torch.equal(ranks.add(torch.ones(2)), torch.ones(2))
        ranks.check_alike("anything", 1, "Nothing.")


def test_one_process_alone_raises_what_is_raised() -> None:
    def refuse(place: int) -> int:
        raise PlanError(f"item {place}", expected="another", got="it", fix="Take one.")

    with pytest.raises(PlanError, match="item 0"):
        ALONE.map(refuse, range(3))
