"""What a step keeps for the steps after it."""

from __future__ import annotations

import torch
from support.models import modes
from support.small.graphs import small_model
from torch import Tensor, fx, nn

from calicache.graph_passes import StepMode
from calicache.graph_passes.rewriting.variants import CacheSpec, Variant, VariantSet
from calicache.graph_passes.sampler.kept import Kept, keep_values, run_step

# --- the kept values ------------------------------------------------------------------------------


def variants(*histories: int, outputs: int = 1) -> VariantSet:
    """Caches `cache_0`, `cache_1`, ... that keep so many values each; the last is the output's."""
    caches = tuple(
        CacheSpec(f"cache_{k}", f"node_{k}", None, (2,), torch.float32, history)
        for k, history in enumerate(histories)
    )
    module = fx.GraphModule(nn.Module(), fx.Graph())
    names = tuple(cache.name for cache in caches)
    writes = {StepMode.REFRESH: names, StepMode.CALIBRATE: names[-1:]}
    modes = {mode: Variant(mode, module, (), {}, (), own) for mode, own in writes.items()}
    return VariantSet(modes, caches, max(histories, default=1), {}, outputs)


def step(
    variant_set: VariantSet, number: int, kept: Kept, mode: StepMode = StepMode.REFRESH
) -> tuple[list[Tensor], Kept]:
    """The results of a step, all full of its number, and what is kept then."""
    variant = variant_set.variants[mode]
    count = variant_set.outputs + len(variant.writes)
    results = [torch.full((2,), float(number)) for _ in range(count)]
    return results, keep_values(variant_set, variant, results, kept, [torch.zeros(2)])


def numbers(kept: Kept) -> dict[str, list[float]]:
    return {name: [float(value[0]) for value in values] for name, values in kept.items()}


def test_the_newest_value_comes_first_and_the_oldest_goes() -> None:
    variant_set, kept = variants(3), {}
    seen = []
    for number in range(5):
        _, kept = step(variant_set, number, kept)
        seen.append(numbers(kept)["cache_0"])
    assert seen == [[0], [1, 0], [2, 1, 0], [3, 2, 1], [4, 3, 2]]


def test_every_cache_keeps_its_own_history() -> None:
    variant_set, kept = variants(1, 3, 2), {}
    for number in range(4):
        _, kept = step(variant_set, number, kept)
    assert numbers(kept) == {"cache_0": [3], "cache_1": [3, 2, 1], "cache_2": [3, 2]}


def test_a_step_adds_to_the_caches_that_it_writes_alone() -> None:
    variant_set, kept = variants(2, 2), {}
    for number, mode in enumerate(modes("RCRCC")):
        _, kept = step(variant_set, number, kept, mode)
    assert numbers(kept) == {"cache_0": [2, 0], "cache_1": [4, 3]}


def test_older_values_are_handed_on_as_they_are() -> None:
    variant_set = variants(2)
    _, before = step(variant_set, 0, {})
    _, after = step(variant_set, 1, before)
    assert after["cache_0"][1] is before["cache_0"][0]
    assert len(before["cache_0"]) == 1


def test_nothing_is_copied_that_nobody_else_holds() -> None:
    results, kept = step(variants(1, 1), 7, {})
    assert all(kept[f"cache_{k}"][0] is results[1 + k] for k in range(2))


def test_what_the_caller_may_write_to_is_copied() -> None:
    """The caller's own tensor, the model's output, and views of both."""
    given, output, own = torch.ones(4), torch.full((4,), 2.0), torch.full((2,), 3.0)
    caches = [given[:2], given.view(2, 2)[1], output[2:], output, own]
    variant_set = variants(*[1] * len(caches))
    variant = variant_set.variants[StepMode.REFRESH]
    kept = keep_values(variant_set, variant, [output, *caches], {}, [given])
    given.zero_()
    output.zero_()
    values = [float(value.max()) for (value,) in kept.values()]
    assert values == [1.0, 1.0, 2.0, 2.0, 3.0]
    assert kept["cache_4"][0] is own


def test_outputs_that_are_no_tensors_are_nobodys_memory() -> None:
    variant_set, cache = variants(1, outputs=2), torch.ones(2)
    variant = variant_set.variants[StepMode.REFRESH]
    results = [torch.zeros(2), 5, cache]
    kept = keep_values(variant_set, variant, results, {}, [torch.zeros(2)])
    assert kept["cache_0"][0] is cache


# --- one step -------------------------------------------------------------------------------------


def test_a_step_is_what_the_optimised_model_does() -> None:
    fast = small_model(2)
    fast.reset()
    variant_set, kept = fast.compiled.variant_set, {}
    images, pace = torch.randn(2, 2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for step, mode in enumerate(fast.plan.schedule):
        if mode is StepMode.FORECAST:
            break
        time = int(fast.plan.binding.grid.timesteps[step])
        call = [images + 0.1 * step * pace, torch.full((2,), time), torch.tensor([1, 10])]
        output, kept = run_step(variant_set, mode, kept, step, call)
        assert torch.equal(output, fast(*call))  # the same program on the same numbers
        own = fast.state.calls[-1].kept
        assert kept.keys() == own.keys()
        for name, values in kept.items():
            assert all(torch.equal(a, b) for a, b in zip(values, own[name], strict=True))
