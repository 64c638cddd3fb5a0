"""Ranges of what is read from files: types whose bounds the reader of documents holds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MAX_STEPS = 2_000
MAX_GRIDS = 64

Count = Annotated[int, Field(ge=0, le=2**62)]
"""Bytes, multiply-accumulates, ranks."""

Number = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is neither NaN nor infinite."""

MAX_WEIGHT = 1e6
Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
"""What a value of the model is multiplied with: a larger one would only overflow."""

Calls = Annotated[int, Field(ge=1, le=64)]
"""Calls of the model in a step."""

Extent = Annotated[int, Field(ge=0, le=2**40)]
"""Size of one dimension."""

Shape = Annotated[tuple[Extent, ...], Field(max_length=16)]

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256, hexadecimal."""

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$")]
"""Name of a file inside a folder."""
