"""What this sample has from `samples/fashion_dit`, where its scripts find it too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "fashion_dit"))

from classifier import load_classifier
from data import Split, load_split
from descent import descend, falling_rate, make_optimizer, update_average
from model import Mlp, TimestepEmbedder, modulate, sine_cosine_positions
from weights import half, load_training_state, load_weights, save_atomic, training_state

__all__ = [
    "load_classifier",
    "Split",
    "load_split",
    "descend",
    "falling_rate",
    "make_optimizer",
    "update_average",
    "Mlp",
    "TimestepEmbedder",
    "modulate",
    "sine_cosine_positions",
    "half",
    "load_weights",
    "save_atomic",
    "training_state",
    "load_training_state",
]
