"""The sample DiT for `calicache evaluate samples/fashion_dit/evaluation.py:fashion_dit`.

    python samples/fashion_dit/evaluation.py OUT.npz

writes the 10,000 test images of Fashion-MNIST, for `--reference`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from classifier import NUM_CLASSES, load_classifier
from data import load_split
from diffusion import GuidedDDIM
from model import FashionDiT
from scores import Signed, eight_bit
from search_plan import GUIDANCE, STEPS
from weights import DIT_WEIGHTS, load_weights

from calicache.tools.evaluate.subject import EvaluationModel


def fashion_dit() -> EvaluationModel:
    """The sampler that the released plan was searched for, and the sample classifier."""
    model, classifier = load_weights(FashionDiT(), DIT_WEIGHTS), load_classifier()
    sampler = GuidedDDIM(STEPS, GUIDANCE, model.null_class)
    return EvaluationModel(
        name="sample DiT",
        model=model,
        sample=partial(sample, sampler),
        features=Signed(classifier, logits=False).eval(),
        logits=Signed(classifier, logits=True).eval(),
        settings={"sampler": "DDIM", "steps": STEPS, "guidance": GUIDANCE},
    )


def sample(sampler: GuidedDDIM, denoiser: nn.Module, seeds: Sequence[int]) -> Tensor:
    """Images uint8 (N, 28, 28, 1); a seed gives the noise, its last digit the class."""
    noise = [
        torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    labels = torch.tensor([seed % NUM_CLASSES for seed in seeds])
    images = sampler.sample(denoiser, torch.stack(noise), labels)
    return eight_bit(images).permute(0, 2, 3, 1).contiguous()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, help="folder with the files of Fashion-MNIST")
    arguments = parser.parse_args()
    images = load_split(arguments.data, train=False).images
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(arguments.out, images.unsqueeze(3).numpy())


if __name__ == "__main__":
    main()
