"""How large the inputs of the tables are; `zoo.other_sizes` reads the tables again with others."""

from __future__ import annotations

TEXT = 6  # tokens of a prompt
HEIGHT = 4  # rows of tokens in an image or a frame; their columns stay as they are
