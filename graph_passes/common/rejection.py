"""What a pass leaves alone, with the reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejection:
    """Something that looked like a site or a branch and is left alone, with the reason."""

    name: str
    node: str
    reason: str
