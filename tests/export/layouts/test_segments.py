"""What goes from segment to segment in the `sampler` layout."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from calicache.export.layouts.segments import KeptValue, handed_on
from calicache.graph_passes.rewriting.variants import CacheSpec, Variant, VariantSet
from calicache.graph_passes.settings.choices import StepMode

R, C, U, _ = StepMode
CACHE = CacheSpec("cache_a", "a", None, (2, 3), torch.float32, history=3)


def variants(refresh: tuple[str, ...], calibrate: tuple[str, ...]) -> VariantSet:
    module = fx.GraphModule(nn.Module(), fx.Graph())
    reads = {R: refresh, C: calibrate}
    modes = {mode: Variant(mode, module, names, {}, ()) for mode, names in reads.items()}
    return VariantSet(modes, (CACHE,), 3, {}, 1)


@pytest.mark.parametrize(
    ("refresh", "calibrate", "count"),
    [
        ((), ("cache_a",), 0),  # the segment's own
        ((), ("cache_a", "cache_a_back1"), 1),
        ((), ("cache_a_back2",), 2),
        (("cache_a",), ("cache_a",), 1),  # REFRESH reads before it writes
        (("cache_a", "cache_a_back2"), ("cache_a_back1",), 3),
        (("cache_b",), ("weight_0",), 0),
    ],
)
def test_as_many_refreshes_go_on_as_are_read(
    refresh: tuple[str, ...], calibrate: tuple[str, ...], count: int
) -> None:
    kept = handed_on(variants(refresh, calibrate), CACHE)
    assert kept == [KeptValue("cache_a", back) for back in range(count)]


def test_what_goes_from_step_to_step_is_all_that_is_read() -> None:
    read = variants((), ("cache_a", "cache_a_back1"))
    kept = handed_on(read, CACHE, by_step=True)
    assert kept == [KeptValue("cache_a", back) for back in range(2)]


def test_a_kept_refresh_fills_an_older_slot_once_the_segment_has_its_own() -> None:
    newest, older = KeptValue("cache_a", 0), KeptValue("cache_a", 1)
    assert (newest.slot_before_refresh, newest.slot_after_refresh) == ("cache_a", "cache_a_back1")
    assert (older.slot_before_refresh, older.slot_after_refresh) == (
        "cache_a_back1",
        "cache_a_back2",
    )
