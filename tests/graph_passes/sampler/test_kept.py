"""What a step keeps of its REFRESH for the steps after it."""

from __future__ import annotations

import pytest
import torch
from support.small.graphs import small_model
from torch import Tensor

from calicache.graph_passes import StepMode
from calicache.graph_passes.rewriting.variants import CacheSpec, VariantSet
from calicache.graph_passes.sampler.kept import Kept, keep_refresh, run_step

# --- the kept refreshes ---------------------------------------------------------------------------


def variants(*histories: int, outputs: int = 1) -> VariantSet:
    """Caches `cache_0`, `cache_1`, ... that keep so many refreshes each; no graphs."""
    caches = tuple(
        CacheSpec(f"cache_{k}", f"node_{k}", None, (2,), torch.float32, history)
        for k, history in enumerate(histories)
    )
    return VariantSet({}, caches, max(histories, default=1), {}, outputs)


def refresh(
    variant_set: VariantSet, number: int, kept: Kept, history: int | None = None
) -> tuple[list[Tensor], Kept]:
    """The results of a REFRESH step, all full of its number, and what is kept then."""
    own = [torch.full((2,), float(number)) for _ in range(variant_set.outputs)]
    results = [*own, *(torch.full((2,), float(number)) for _ in variant_set.caches)]
    history = variant_set.history if history is None else history
    return results, keep_refresh(variant_set, results, kept, history, [torch.zeros(2)])


def numbers(kept: Kept) -> list[dict[str, float]]:
    return [{name: float(value[0]) for name, value in values.items()} for values in kept]


def test_the_newest_refresh_comes_first_and_the_oldest_goes() -> None:
    variant_set, kept = variants(3), ()
    seen = []
    for number in range(5):
        _, kept = refresh(variant_set, number, kept)
        seen.append([values["cache_0"] for values in numbers(kept)])
    assert seen == [[0], [1, 0], [2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_every_cache_keeps_its_own_history() -> None:
    variant_set, kept = variants(1, 3, 2), ()
    for number in range(4):
        _, kept = refresh(variant_set, number, kept)
    assert numbers(kept) == [
        {"cache_0": 3, "cache_1": 3, "cache_2": 3},
        {"cache_1": 2, "cache_2": 2},
        {"cache_1": 1},
    ]


@pytest.mark.parametrize("history", [1, 2])
def test_fewer_refreshes_can_be_kept_than_the_variants_could_read(history: int) -> None:
    variant_set, kept = variants(3), ()
    for number in range(4):
        _, kept = refresh(variant_set, number, kept, history)
    assert [values["cache_0"] for values in numbers(kept)] == [3, 2][:history]


def test_older_values_are_handed_on_as_they_are() -> None:
    variant_set = variants(2)
    _, before = refresh(variant_set, 0, ())
    _, after = refresh(variant_set, 1, before)
    assert after[1]["cache_0"] is before[0]["cache_0"]
    assert len(before) == 1


def test_nothing_is_copied_that_nobody_else_holds() -> None:
    results, kept = refresh(variants(1, 1), 7, ())
    assert [value is result for value, result in zip(kept[0].values(), results[1:], strict=True)]
    assert all(kept[0][f"cache_{k}"] is results[1 + k] for k in range(2))


def test_what_the_caller_may_write_to_is_copied() -> None:
    """The caller's own tensor, the model's output, and views of both."""
    given, output, own = torch.ones(4), torch.full((4,), 2.0), torch.full((2,), 3.0)
    caches = [given[:2], given.view(2, 2)[1], output[2:], output, own]
    variant_set = variants(*[1] * len(caches))
    (kept,) = keep_refresh(variant_set, [output, *caches], (), 1, [given])
    given.zero_()
    output.zero_()
    values = [float(value.max()) for value in kept.values()]
    assert values == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert kept["cache_4"] is own


def test_outputs_that_are_no_tensors_are_nobodys_memory() -> None:
    variant_set, cache = variants(1, outputs=2), torch.ones(2)
    (kept,) = keep_refresh(variant_set, [torch.zeros(2), 5, cache], (), 1, [torch.zeros(2)])
    assert kept["cache_0"] is cache


# --- one step -------------------------------------------------------------------------------------


def test_a_step_is_what_the_optimised_model_does() -> None:
    fast = small_model(2)
    fast.reset()
    variant_set, kept = fast.compiled.variant_set, ()
    images, pace = torch.randn(2, 2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for step, mode in enumerate(fast.plan.schedule):
        if mode is StepMode.FORECAST:
            break
        time = int(fast.plan.binding.grid.timesteps[step])
        call = [images + 0.1 * step * pace, torch.full((2,), time), torch.tensor([1, 10])]
        output, kept = run_step(variant_set, mode, kept, step, call, variant_set.history)
        assert torch.equal(output, fast(*call))  # the same program on the same numbers
        own = fast.state.calls[-1].kept
        assert len(kept) == len(own)
        for mine, its in zip(kept, own, strict=True):
            assert mine.keys() == its.keys()
            assert all(torch.equal(mine[name], its[name]) for name in mine)
