"""The comparison with diffusers' own tests, on a checkout that holds one small file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.pipelines.suite import Comparison, compare, outcomes

pytestmark = pytest.mark.slow

TESTS = """
import pytest
import torch
from diffusers import DiTPipeline
from support.pipelines.tiny import dit_pipeline
from transformers import AutoTokenizer

from calicache import OptimizedModel


class TestDiT:
    pipeline_class = DiTPipeline

    def get_dummy_components(self):
        parts = dit_pipeline().components
        return {name: part for name, part in parts.items() if part is not None}

    def get_dummy_inputs(self, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        steps = {"num_inference_steps": 2, "output_type": "np"}
        return {"class_labels": [1], "generator": generator, **steps}

    def test_an_image(self):
        pipe = DiTPipeline(**self.get_dummy_components())
        assert pipe(**self.get_dummy_inputs("cpu")).images.shape == (1, 64, 64, 3)

    def test_parts_are_there(self):
        tokenizer = AutoTokenizer.from_pretrained("hf-internal-testing/tiny-random-t5")
        assert tokenizer.decode(tokenizer("a cat").input_ids) == "a cat</s>"

    def test_of_plain_transformers(self):
        assert not isinstance(self.get_dummy_components()["transformer"], OptimizedModel)

    def test_that_fails(self):
        raise ValueError("always")

    @pytest.mark.skip
    def test_skipped(self):
        pass
"""


def test_outcomes_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tests" / "pipelines" / "dit" / "test_dit.py"
    file.parent.mkdir(parents=True)
    file.write_text(TESTS)

    plain = outcomes(tmp_path, "dit/test_dit.py", "plain")
    optimised = outcomes(tmp_path, "dit/test_dit.py", "optimised")
    comparison = compare("dit/test_dit.py", plain, optimised)

    why = comparison.regressions["TestDiT::test_of_plain_transformers"]
    assert "assert not True" in why
    assert comparison == Comparison(
        "dit/test_dit.py",
        tests=4,
        fast=1,
        failures=1,
        optimised_failures=2,
        regressions={"TestDiT::test_of_plain_transformers": why},
    )
    assert comparison.row == "| `dit/test_dit.py` | 4 | 1 | 1 | 2 | 1 |"
    file.unlink()  # what was run once is kept
    assert outcomes(tmp_path, "dit/test_dit.py", "optimised") == optimised
