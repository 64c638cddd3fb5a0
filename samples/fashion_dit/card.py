"""Draw the sample grid of the model card and score it with the classifier.

    python samples/fashion_dit/card.py

Writes `samples/fashion_dit/samples.png`: one column a class, four seeds, 50 DDIM steps.
"""

from __future__ import annotations

from pathlib import Path

import torch
from classifier import load_classifier
from diffusion import GuidedDDIM
from images import save_grid
from model import FashionDiT
from weights import DIT_WEIGHTS, load_weights

ROWS, STEPS, GUIDANCE = 6, 50, 1.5


def main() -> None:
    """Sample, save the grid, print how often the classifier sees the class that was asked for."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    labels = torch.arange(10).repeat(ROWS)
    noise = torch.randn(len(labels), 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images = GuidedDDIM(STEPS, GUIDANCE, model.null_class).sample(model, noise, labels)
    save_grid(list(images.split(10)), Path(__file__).parent / "samples.png")
    with torch.no_grad():
        seen = load_classifier()(images).argmax(dim=1)
    print(f"classifier agrees on {int((seen == labels).sum())} of {len(labels)} images")


if __name__ == "__main__":
    main()
