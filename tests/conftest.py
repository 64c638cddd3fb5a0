"""Real, small models and what their real samplers feed to them."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from model import FashionDiT, FashionDiTConfig
from playwright.sync_api import sync_playwright
from support.analyses import analyse_once, analysis_of
from support.artifacts import RUN_FOLDER, quick_exports
from support.models import diffusers_calls, sample_dit, shake

from calicache.graph_passes import Plan, Recording, StepMode, record
from calicache.graph_passes.api.running import forms
from calicache.graph_passes.rewriting import workspace
from calicache.graph_passes.sites.analysis import Analysis, analyse


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the workers of pytest-xdist have their parent's
        os.environ[RUN_FOLDER] = tempfile.mkdtemp(prefix="calicache tests ")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(RUN_FOLDER), ignore_errors=True)


def pytest_collection_finish() -> None:
    """Half a million objects of libraries stay: looking through them is a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def _one_analysis_a_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, quick_exports():
        for user in (workspace, forms):
            patch.setattr(user, "analyse", analyse_once)
        yield


@pytest.fixture(scope="module")
def own_captures() -> Iterator[None]:
    """Every workspace and every table of forms captures for itself, as for a user."""
    with pytest.MonkeyPatch.context() as patch:
        for user in (workspace, forms):
            patch.setattr(user, "analyse", analyse)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield started
        started.close()


@pytest.fixture(scope="session")
def dit() -> FashionDiT:
    """The sample's architecture at 2 blocks of width 32, all weights random."""
    torch.manual_seed(0)
    return shake(FashionDiT(FashionDiTConfig(width=32, depth=2, frequency_channels=32)))


@pytest.fixture(scope="session")
def dit_recording(dit: FashionDiT) -> Recording:
    with record(dit) as recording:
        sample_dit(dit)
    return recording


@pytest.fixture(scope="session")
def dit_analysis(dit: FashionDiT, dit_recording: Recording) -> Analysis:
    return analysis_of(dit, dit_recording)


@pytest.fixture(scope="session")
def dit_plan(dit: FashionDiT, dit_recording: Recording) -> Plan:
    """The paper's method: stale anchors, factors from channel statistics of the increments."""
    return Plan.from_trajectory(
        dit, dit_recording, schedule=3, rank=4, weighting="increment", order=0, correct=False
    )


@pytest.fixture(scope="session")
def forecast_plan(dit: FashionDiT, dit_recording: Recording) -> Plan:
    """Everything at once: order 2, covariance, joint siblings, all modes, output weights."""
    letters = {"R": 0, "C": 1, "U": 2, "F": 3}
    schedule = [StepMode(letters[letter]) for letter in "RCRURF"]
    return Plan.from_trajectory(dit, dit_recording, schedule=schedule, rank=4)


@pytest.fixture(scope="session")
def diffusers_dit() -> DiTTransformer2DModel:
    """diffusers' own DiT at 2 blocks of width 16, all weights random."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return shake(model)


@pytest.fixture(scope="session")
def diffusers_recording(diffusers_dit: DiTTransformer2DModel) -> Recording:
    with record(diffusers_dit) as recording:
        diffusers_calls(diffusers_dit)
    return recording


@pytest.fixture(scope="session")
def diffusers_analysis(
    diffusers_dit: DiTTransformer2DModel, diffusers_recording: Recording
) -> Analysis:
    return analysis_of(diffusers_dit, diffusers_recording)
