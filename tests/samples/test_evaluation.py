"""The sample DiT for `calicache evaluate`: images of seeds, networks, reference, page."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import evaluation
import numpy as np
import pytest
import torch
from data import DEBIAN_FOLDER, load_split
from diffusion import GuidedDDIM
from fidelity_report import EVALUATION_FILE, write_report
from model import FashionDiT

from calicache.graph_passes import Plan
from calicache.tools.evaluate.evaluation import FIGURES, Evaluation, Figure, Reference
from calicache.tools.evaluate.npz import NpzImages
from calicache.tools.evaluate.shards import SampleSettings

DOCS = Path(__file__).parents[2] / "docs"


def test_a_seed_gives_its_image_in_any_batch(dit: FashionDiT) -> None:
    sample = partial(evaluation.sample, GuidedDDIM(3, 1.5, dit.null_class), dit)
    images = sample(range(12, 17))
    assert images.dtype == torch.uint8
    assert images.shape == (5, 28, 28, 1)
    # Products of other sizes round otherwise, which may move a pixel to the next level.
    assert (images[2:4].int() - sample([14, 15]).int()).abs().max() <= 1
    assert not torch.equal(images[0], images[1])


def test_the_subject_is_what_the_plan_was_made_for() -> None:
    subject = evaluation.fashion_dit()
    plan = Plan.load(Path(evaluation.__file__).parent / "plan")
    assert subject.settings["steps"] == len(plan.recipe.schedule)
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    assert subject.features is not None
    assert subject.logits is not None
    assert subject.features(images).shape == (3, 128)
    assert subject.logits(images).shape == (3, 10)


@pytest.mark.skipif(
    not DEBIAN_FOLDER.exists(), reason="Debian's dataset-fashion-mnist is not installed"
)
def test_the_reference_is_the_test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out" / "real.npz"
    monkeypatch.setattr(sys, "argv", ["evaluation.py", str(path)])
    evaluation.main()
    assert NpzImages.open(path).shape == (10_000, 28, 28, 1)
    images = load_split(train=False).images
    np.testing.assert_array_equal(np.load(path)["arr_0"][..., 0], images.numpy())


def test_fidelity_page_has_the_figures_with_their_intervals(tmp_path: Path) -> None:
    shutil.copy(DOCS / "fidelity.json", tmp_path)
    figures = dict.fromkeys(FIGURES, Figure(0.46, 0.44, 0.48, 0.01))
    settings = SampleSettings("weights", "plan", 20, {})
    result = Evaluation(
        "sample DiT", 50_000, 500, settings, {}, Reference(10_000, "sum"), 3, figures, {}
    )
    result.save(tmp_path / EVALUATION_FILE)
    write_report(json.loads((tmp_path / "fidelity.json").read_text()), tmp_path)
    text = (tmp_path / "fidelity.md").read_text()
    assert "50,000 images" in text
    assert "jackknife over 100 shards" in text
    for name in FIGURES.values():
        assert f"| {name} | 0.4600 | 0.4400 to 0.4800 |" in text
    replace(result, figures={"psnr": Figure(50.0, None, None, None)}).save(
        tmp_path / EVALUATION_FILE
    )
    write_report(json.loads((tmp_path / "fidelity.json").read_text()), tmp_path)
    assert "| 50.0000 | unknown |" in (tmp_path / "fidelity.md").read_text()
