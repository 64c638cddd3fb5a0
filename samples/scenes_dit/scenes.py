"""Scenes of 64x64 pixels made of Fashion-MNIST items, and the captions that describe them.

A scene has one to three items, each in a quarter of the image of its own and with a colour, on
a pale background: "red shirt top left , blue bag bottom right , on green". Everything comes from
a generator's draws, a whole batch at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from shared import Split
from torch import Tensor

IMAGE_SIZE, CELL, ITEM = 64, 32, 28
MAX_ITEMS, CAPTION_LENGTH = 3, 20

COLOURS = {
    "red": (0.90, 0.12, 0.15),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.95, 0.85, 0.10),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.12, 0.30, 0.95),
    "purple": (0.60, 0.12, 0.75),
}
# In the order of Fashion-MNIST's labels.
ITEMS = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
PADDING = 0
VOCABULARY = ("", ",", "on", "top", "bottom", "left", "right", *COLOURS, *ITEMS)
_WORD = {word: index for index, word in enumerate(VOCABULARY)}
_CELL_WORDS = torch.tensor(
    [[_WORD[row], _WORD[side]] for row in ("top", "bottom") for side in ("left", "right")]
)


@dataclass(frozen=True, slots=True)
class Scenes:
    """What a batch of scenes shows; of the three places for items, the first `count` are used.

    Attributes:
        count: items in each scene, 1 to 3, int64 (B,).
        source: which image of the split an item is, int64 (B, 3).
        label: the item's class, int64 (B, 3).
        colour: place in `COLOURS`, int64 (B, 3).
        cell: the quarter, row by row from the top left, int64 (B, 3); no two alike in a scene.
        offset: the item's rows and columns from its quarter's corner, 0 to 4, int64 (B, 3, 2).
        background: place in `COLOURS`, int64 (B,).
    """

    count: Tensor
    source: Tensor
    label: Tensor
    colour: Tensor
    cell: Tensor
    offset: Tensor
    background: Tensor


def draw_scenes(split: Split, batch: int, draw: torch.Generator) -> Scenes:
    """Scenes of a split's items, by a generator's next draws."""
    source = torch.randint(len(split.labels), (batch, MAX_ITEMS), generator=draw)
    return Scenes(
        count=torch.randint(1, MAX_ITEMS + 1, (batch,), generator=draw),
        source=source,
        label=split.labels[source],
        colour=torch.randint(len(COLOURS), (batch, MAX_ITEMS), generator=draw),
        cell=torch.rand(batch, 4, generator=draw).argsort(dim=1)[:, :MAX_ITEMS],
        offset=torch.randint(CELL - ITEM + 1, (batch, MAX_ITEMS, 2), generator=draw),
        background=torch.randint(len(COLOURS), (batch,), generator=draw),
    )


def render(scenes: Scenes, split: Split) -> Tensor:
    """Images float32 (B, 3, 64, 64) in -1 .. 1."""
    batch, palette = len(scenes.count), torch.tensor(list(COLOURS.values()))
    grey = _items(scenes, split)  # (B, 3, 32, 32)
    sample = torch.arange(batch)[:, None]
    cells = torch.zeros(batch, 4, CELL, CELL)
    cells[sample, scenes.cell] = grey
    colour = torch.zeros(batch, 4, 3)
    colour[sample, scenes.cell] = palette[scenes.colour]
    background = (0.35 * palette[scenes.background] + 0.65).view(batch, 1, 3, 1, 1)
    cells = cells.unsqueeze(2)  # (B, 4, 1, 32, 32)
    # What is almost black is no part of an item: some photographs have such a background.
    cover = (5 * cells - 0.5).clamp(0.0, 1.0)
    shade = (0.3 + 0.7 * cells) * colour[..., None, None]  # (B, 4, 3, 32, 32)
    quarters = (background + cover * (shade - background)).view(batch, 2, 2, 3, CELL, CELL)
    image = quarters.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, IMAGE_SIZE, IMAGE_SIZE)
    return image * 2 - 1


def captions(scenes: Scenes) -> Tensor:
    """Word ids int64 (B, 20), padded at the end."""
    batch = len(scenes.count)
    item = torch.stack(
        [
            scenes.colour + _WORD["red"],
            scenes.label + _WORD[ITEMS[0]],
            *_CELL_WORDS[scenes.cell].unbind(-1),
            torch.full_like(scenes.label, _WORD[","]),
        ],
        dim=-1,
    )  # (B, 3, 5)
    ids = torch.full((batch, CAPTION_LENGTH), PADDING)
    ids[:, : 5 * MAX_ITEMS] = item.flatten(1)
    place = torch.arange(CAPTION_LENGTH)
    end = 5 * scenes.count[:, None]  # (B, 1)
    ids = torch.where(place < end, ids, PADDING)
    ids = torch.where(place == end, _WORD["on"], ids)
    background = (scenes.background + _WORD["red"])[:, None]
    return torch.where(place == end + 1, background, ids)


def empty_captions(batch: int) -> Tensor:
    """The condition that says nothing, for classifier-free guidance: padding, int64 (B, 20)."""
    return torch.full((batch, CAPTION_LENGTH), PADDING)


def encode_words(*texts: str) -> Tensor:
    """Word ids int64 (B, 20) of captions whose words are separated by spaces.

    Raises:
        ValueError: a word is not in the vocabulary, or there are too many.
    """
    ids = empty_captions(len(texts))
    for row, text in zip(ids, texts, strict=True):
        words = text.split()
        unknown = [word for word in words if word not in _WORD]
        if unknown or len(words) > CAPTION_LENGTH:
            raise ValueError(
                f"a caption has up to {CAPTION_LENGTH} words of {VOCABULARY[1:]}; "
                f"got {len(words)} words, unknown: {unknown}"
            )
        row[: len(words)] = torch.tensor([_WORD[word] for word in words])
    return ids


def decode_words(caption: Tensor) -> str:
    """The text of one caption's ids (20,)."""
    return " ".join(VOCABULARY[word] for word in caption.tolist() if word != PADDING)


def _items(scenes: Scenes, split: Split) -> Tensor:
    """The items (B, 3, 32, 32) in 0 .. 1, moved inside their quarters; zero beyond the count."""
    room = CELL - ITEM
    images = F.pad(split.images[scenes.source], (room,) * 4)  # (B, 3, 36, 36)
    rows, columns = (room - scenes.offset[..., None] + torch.arange(CELL)).unbind(2)  # (B, 3, 32)
    sample, item = torch.arange(len(images))[:, None, None, None], torch.arange(MAX_ITEMS)
    moved = images[sample, item[:, None, None], rows[..., :, None], columns[..., None, :]]
    shown = item < scenes.count[:, None]  # (B, 3)
    return moved.float().div(255.0) * shown[..., None, None]
