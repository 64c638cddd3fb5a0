"""What the grid has from the samples of its models, where its scripts find it too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("fashion_dit", "scenes_dit")]

from autoencoder import Autoencoder, latent_noise, load_autoencoder
from classifier import NUM_CLASSES, FashionClassifier, load_classifier
from data import Split, load_split
from model import FashionDiT
from peers import (
    DynamicModes,
    ForecastCalibrate,
    LinearPredictor,
    Peer,
    PeerRun,
    Spectrum,
    TaylorSeerLite,
    fit_weights,
)
from scene_weights import load_scene_dit
from scenes import captions, draw_scenes, empty_captions, render
from scores import sample_errors
from weights import DIT_WEIGHTS, load_weights, save_atomic

__all__ = [
    "Autoencoder",
    "latent_noise",
    "load_autoencoder",
    "NUM_CLASSES",
    "FashionClassifier",
    "load_classifier",
    "Split",
    "load_split",
    "FashionDiT",
    "DynamicModes",
    "ForecastCalibrate",
    "LinearPredictor",
    "Peer",
    "PeerRun",
    "Spectrum",
    "TaylorSeerLite",
    "fit_weights",
    "load_scene_dit",
    "captions",
    "draw_scenes",
    "empty_captions",
    "render",
    "sample_errors",
    "DIT_WEIGHTS",
    "load_weights",
    "save_atomic",
]
