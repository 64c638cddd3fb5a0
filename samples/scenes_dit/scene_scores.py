"""How far an image shows what its caption says: background, colours and classes of items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scenes import CELL, COLOURS, ITEM, MAX_ITEMS, Scenes
from shared import load_classifier
from torch import Tensor

# In 0 .. 1 and the largest of three channels; backgrounds are pale, items are not.
_CONTRAST = 0.25


@dataclass(frozen=True, slots=True)
class Agreement:
    """Shares of what was asked for that is seen; colours and classes are over the items."""

    backgrounds: float
    colours: float
    classes: float


@torch.no_grad()
def agreement(images: Tensor, scenes: Scenes) -> Agreement:
    """Compare images with the scenes that their captions describe.

    Args:
        images: float (B, 3, 64, 64) in -1 .. 1.
        scenes: what was asked for; sources and offsets are not looked at.
    """
    palette = torch.tensor(list(COLOURS.values()))
    shown = torch.arange(MAX_ITEMS) < scenes.count[:, None]  # (B, 3)
    pixels = ((images + 1) / 2).clamp(0, 1)
    # Most of a scene is background.
    background = pixels.flatten(2).median(dim=2).values  # (B, 3)
    nearest = torch.cdist(background, 0.35 * palette + 0.65).argmin(dim=1)
    quarters = _asked_quarters(pixels, scenes)  # (K, 3, 32, 32)
    behind = background.repeat_interleave(scenes.count, dim=0)[..., None, None]
    cover = ((quarters - behind).abs().amax(dim=1) > _CONTRAST).float()  # (K, 32, 32)
    mean = torch.einsum("kchw,khw->kc", quarters, cover)  # of any length
    directions = palette / palette.norm(dim=1, keepdim=True)
    colours = (mean @ directions.T).argmax(dim=1)
    labels = _classify(quarters, cover, palette[scenes.colour[shown]])
    empty = cover.sum(dim=(1, 2)) == 0
    return Agreement(
        backgrounds=_share(nearest == scenes.background),
        colours=_share((colours == scenes.colour[shown]) & ~empty),
        classes=_share((labels == scenes.label[shown]) & ~empty),
    )


def _asked_quarters(pixels: Tensor, scenes: Scenes) -> Tensor:
    """The quarters (K, 3, 32, 32) in which items were asked for, scene by scene."""
    batch = len(pixels)
    quarters = pixels.view(batch, 3, 2, CELL, 2, CELL).permute(0, 2, 4, 1, 3, 5)
    quarters = quarters.reshape(batch, 4, 3, CELL, CELL)
    shown = torch.arange(MAX_ITEMS) < scenes.count[:, None]
    return quarters[torch.arange(batch)[:, None], scenes.cell][shown]


def _classify(quarters: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    """Classes (K,) that the classifier of grey items sees; the renderer's shading undone."""
    lightness = torch.einsum("kchw,kc->khw", quarters, colour / colour.square().sum(1, True))
    grey = ((lightness - 0.3) / 0.7).clamp(0, 1) * cover  # (K, 32, 32)
    edge = (CELL - ITEM) // 2
    grey = grey[:, None, edge:-edge, edge:-edge]  # (K, 1, 28, 28)
    return load_classifier()(grey * 2 - 1).argmax(dim=1)


def _share(right: Tensor) -> float:
    return float(right.float().mean())
