"""Caches of a session: a moving store and a ring of fixed buffers hold the same values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.artifacts import exported

from calicache.export import Session
from calicache.export.session.caches import Caches, FixedCaches, MovingCaches
from calicache.graph_passes import StepMode, optimize
from calicache.graph_passes.common.errors import ExportError
from calicache.graph_passes.recording.signature import TensorSpec
from calicache.graph_passes.rewriting.insertion import slot_name

HISTORY = 3
CACHES = (TensorSpec("a", (2, 3), "float32"), TensorSpec("b", (1,), "float32"))


def written(value: float, cache: TensorSpec) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(np.full(cache.shape, value, np.float32))


def refresh(store: Caches, value: float, caches: Sequence[TensorSpec] = CACHES) -> None:
    """What a session does: write into the buffer where there is one, allocate otherwise."""
    fresh = {}
    for cache in caches:
        buffer = store.buffer(cache.name)
        if buffer is None:
            buffer = written(value, cache)
        else:
            buffer.update_inplace(np.full(cache.shape, value, np.float32))
        fresh[cache.name] = buffer
    store.keep(fresh)


def number(store: Caches, cache: TensorSpec, back: int) -> float:
    values = store.read(cache, back).numpy()
    assert values.shape == cache.shape
    (number,) = set(values.flatten().tolist())
    return number


# b is read one refresh back at the most, and REFRESH itself reads its oldest value.
SLOTS = frozenset({"a", "a_back2", "b", "b_back1"})
REFRESH_READS = frozenset({"a", "b_back1"})


def stores() -> tuple[Caches, Caches]:
    return (
        MovingCaches(CACHES, HISTORY, SLOTS, "cpu"),
        FixedCaches(CACHES, HISTORY, SLOTS, REFRESH_READS, "cpu"),
    )


@given(runs=st.lists(st.integers(0, 8), min_size=1, max_size=4))
def test_both_stores_hold_the_last_refreshes_of_the_run(runs: list[int]) -> None:
    value = 0.0
    both = stores()
    for length in runs:
        for store in both:
            store.start()
            assert {number(store, cache, 0) for cache in CACHES} == {0.0}
        history: list[float] = []
        for _ in range(length):
            value += 1.0
            history.insert(0, value)
            for store in both:
                refresh(store, value)
                assert store.counts == {"a": len(history), "b": len(history)}
                for cache in CACHES:
                    for back in range(store.depths[cache.name]):
                        # Exact: whole numbers. One that is not there yet is the newest.
                        expected = history[back] if back < len(history) else history[0]
                        assert number(store, cache, back) == expected


@given(steps=st.lists(st.booleans(), min_size=1, max_size=12))
def test_every_cache_has_values_of_its_own_steps(steps: list[bool]) -> None:
    both = stores()
    for store in both:
        store.start()
    history: dict[str, list[float]] = {"a": [], "b": []}
    for value, writes_all in enumerate(steps, start=1):
        caches = CACHES if writes_all else CACHES[1:]
        for cache in caches:
            history[cache.name].insert(0, float(value))
        for store in both:
            refresh(store, float(value), caches)
            assert store.counts == {name: len(values) for name, values in history.items()}
            for cache in CACHES:
                own = history[cache.name]
                for back in range(store.depths[cache.name]):
                    # Exact: whole numbers; zeros before the first value of a cache.
                    expected = (own[back] if back < len(own) else own[0]) if own else 0.0
                    assert number(store, cache, back) == expected


def test_depth_is_what_some_mode_reads() -> None:
    for store in stores():
        assert store.depths == {"a": 3, "b": 2}
    nothing = MovingCaches(CACHES, HISTORY, frozenset(), "cpu")
    assert nothing.depths == {"a": 1, "b": 1}


def test_ring_repeats_its_addresses_and_never_writes_what_refresh_reads() -> None:
    store = stores()[1]
    seen: dict[str, set[int]] = {cache.name: set() for cache in CACHES}
    for _ in range(3):
        store.start()
        for count in range(7):
            for cache in CACHES:
                buffer = store.buffer(cache.name)
                read = [
                    store.read(cache, back).data_ptr()
                    for back in range(HISTORY)
                    if slot_name(cache.name, back) in REFRESH_READS
                ]
                assert buffer is None or buffer.data_ptr() not in read
            refresh(store, count)
            for cache in CACHES:
                seen[cache.name].add(store.read(cache, 0).data_ptr())
    # a: three are read, its oldest not by REFRESH; b: two are read, its oldest by REFRESH.
    assert {name: len(addresses) for name, addresses in seen.items()} == {"a": 3, "b": 3}


def test_stores_hold_one_array_of_zeros_for_all_refreshes_of_a_cache_before_the_first() -> None:
    for store in stores():
        places = {store.read(CACHES[0], back).data_ptr() for back in range(HISTORY)}
        assert len(places) == 1


# --- in a session ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(dit, forecast_plan) -> Path:
    """Order 2 with output weights: REFRESH reads kept outputs too."""
    return exported(optimize(dit, forecast_plan), "pair")


@pytest.mark.slow
def test_runs_of_pair_repeat_their_addresses(pair, dit_recording) -> None:
    session = Session(pair)
    caches = {cache.name for cache in session.manifest.caches}
    assert caches & set(session.manifest.mode(StepMode.REFRESH).reads)
    session._graphs = {}  # counts the combinations of addresses; no CUDA graph on a CPU
    counts, outputs = [], []
    for _ in range(4):
        run = [session.step(step, **call) for step, call in enumerate(dit_recording.calls)]
        outputs.append(run)
        counts.append(len(session._graphs))
    assert counts[1] == counts[2] == counts[3] == len(session.manifest.schedule)
    for run in outputs[1:]:
        # Bit by bit: the same operations on the same values.
        assert all(map(np.array_equal, run, outputs[0]))


@pytest.mark.slow
def test_an_output_is_the_callers_own(pair, dit_recording) -> None:
    session = Session(pair)
    call = dit_recording.calls[0]
    first = session.step(0, **call)
    copy = first.copy()
    session.step(0, **{name: value * 0 for name, value in call.items()})
    assert np.array_equal(first, copy)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["step", "pair"])
def test_cuda_graphs_without_cuda_are_refused(layout: str, dit, dit_plan) -> None:
    folder = exported(optimize(dit, dit_plan), layout)
    expected = rf"cuda_graphs: expected layout pair on CUDA.*got layout {layout} on CPU"
    with pytest.raises(ExportError, match=expected):
        Session(folder, cuda_graphs=True)
