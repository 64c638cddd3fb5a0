"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = (*TOP, *DOCS)


def text_of(page: str) -> str:
    """What is written in a file of the repository."""
    return (ROOT / page).read_text()


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: its language, code and first line, and why it is not run."""

    language: str
    code: str
    line: int
    not_run: str | None


FENCED = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(text: str, language: str) -> list[Block]:
    """The blocks of a language, in their order."""
    return [
        Block(language, match["code"], text.count("\n", 0, match.start("code")), match["reason"])
        for match in FENCED.finditer(text)
        if match["language"] == language
    ]
