"""The one reader of JSON: what it wrote is read back, and nothing else is believed."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from calicache.graph_passes.common.disk.bounds import Calls, Digest, FileName, Number, Shape
from calicache.graph_passes.common.disk.documents import DocumentKind, sum_of
from calicache.graph_passes.common.errors import PlanError


@dataclass(frozen=True, slots=True)
class Thing:
    """With a field of every bounded kind."""

    name: FileName = "a.bin"
    weight: Number = 0.5
    shape: Shape = (2, 3)
    calls: Calls = 1
    content: Digest = "0" * 64
    table: tuple[tuple[float, ...], ...] = ()
    more: dict[str, int] | None = None


KIND = DocumentKind("thing", 3, TypeAdapter(Thing), PlanError, "a thing", "Make it again.")


def crafted(**changes: Any) -> str:
    """A document that someone wrote on purpose: its sum is right."""
    content = json.loads(KIND.dumps(Thing())) | changes
    return json.dumps(content | {"sha256": sum_of(content)})


floats = st.floats(allow_nan=False)


@settings(max_examples=50, deadline=None)
@given(
    table=st.lists(st.lists(floats, max_size=3).map(tuple), max_size=3).map(tuple),
    more=st.none() | st.dictionaries(st.text('aé\n"\\', max_size=4), st.integers(-(2**70), 2**70)),
)
def test_what_is_written_is_read_back(table: Any, more: Any) -> None:
    thing = Thing(table=table, more=more)
    assert KIND.loads(KIND.dumps(thing)) == thing
    assert KIND.dumps(thing) == KIND.dumps(thing)


def test_spaces_and_the_order_of_fields_make_no_difference() -> None:
    content = json.loads(KIND.dumps(Thing()))
    text = json.dumps(dict(reversed(content.items())), indent=7)
    assert KIND.loads(text) == Thing()


REFUSED: dict[str, tuple[Callable[[], str | bytes], str]] = {
    "nothing": (lambda: "", "EOF while parsing"),
    "no JSON": (lambda: b"\xff\xfe", "expected value"),
    "a list": (lambda: "[]", "not a JSON object"),
    "no head": (lambda: "{}", "no JSON that is marked as calicache thing"),
    "another kind": (lambda: crafted(kind="calicache plan"), "marked as calicache thing"),
    "another format": (lambda: crafted(format=2), "format 2, this version reads 3"),
    "a format without end": (lambda: crafted(format="9" * 10**5), "format '9999"),
    "another value": (lambda: KIND.dumps(Thing()).replace("0.5", "0.25"), "its SHA-256 is another"),
    "no sum": (lambda: KIND.dumps(Thing()).replace("sha256", "sha"), "its SHA-256 is another"),
    "nested": (lambda: '{"a":' * 10**5, "recursion limit exceeded"),
    "too many values": (lambda: "[" + "0," * 250_001 + "0]", "more than the 250000 values"),
    "too many bytes": (lambda: " " * (2**24 + 1), "more than the 16777216"),
    "a text as number": (lambda: crafted(weight="1"), "weight: Input should be a valid number"),
    "a truth as number": (lambda: crafted(calls=True), "calls: Input should be a valid integer"),
    "not finite": (lambda: crafted(weight=float("inf")), "weight: Input should be a finite"),
    "too many calls": (lambda: crafted(calls=65), "calls: Input should be less than or equal"),
    "below zero": (lambda: crafted(shape=[-1]), "shape.0: Input should be greater than or equal"),
    "too many dimensions": (lambda: crafted(shape=[1] * 17), "shape: Tuple should have at most"),
    "outside": (lambda: crafted(name="../a"), "name: String should match pattern"),
    "hidden": (lambda: crafted(name=".a"), "name: String should match pattern"),
    "a line more": (lambda: crafted(name="a\n"), "name: String should match pattern"),
    "no digest": (lambda: crafted(content="0"), "content: String should match pattern"),
    "a number as list": (lambda: crafted(table=[1]), "table.0: Input should be a valid array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_such_document_is_refused(case: str, tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    text = make()
    (tmp_path / "a").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError) as caught:
        KIND.read(tmp_path / "a")
    message = str(caught.value)
    assert message.startswith(f"plan: {tmp_path / 'a'}: expected a thing, got ")
    assert message.endswith("Make it again.")
    assert reason in caught.value.got
    assert len(message) < 1000


@pytest.mark.slow
def test_the_worst_of_the_largest_documents_takes_little_time_and_memory(tmp_path: Path) -> None:
    values = "[" + "[]," * 249_990 + "[]]"
    texts = [f'{{"a": {values}}}', crafted(table=[["x"] * 240_000]), crafted(rest=[[]] * 240_000)]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for text in texts:
        (tmp_path / "a").write_text(text)
        with suppress(PlanError):  # the last one has but a field too many
            KIND.read(tmp_path / "a")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # KiB
    assert time.perf_counter() - start < 6  # two seconds each, on a busy core
