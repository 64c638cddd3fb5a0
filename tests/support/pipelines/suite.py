"""Runs diffusers' own tests of pipelines, plain and with optimised transformers, and compares.

`make diffusers-suite DIFFUSERS=checkout`. It goes on where it stopped: what a file gave is kept in
`out/diffusers_suite`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

FILES = (
    *("dit/test_dit.py", "flux/test_pipeline_flux.py", "flux/test_pipeline_flux_img2img.py"),
    *("pixart_alpha/test_pixart.py", "stable_diffusion_3/test_pipeline_stable_diffusion_3.py"),
    *("wan/test_wan.py", "ltx/test_ltx.py", "lumina2/test_pipeline_lumina2.py"),
    *("sana/test_sana.py", "cogvideo/test_cogvideox.py", "aura_flow/test_pipeline_aura_flow.py"),
    *("hunyuan_video/test_hunyuan_video.py", "chroma/test_pipeline_chroma.py"),
    *("qwenimage/test_qwenimage.py", "cogview4/test_cogview4.py", "mochi/test_mochi.py"),
    *("latte/test_latte.py", "allegro/test_allegro.py", "wan/test_wan_image_to_video.py"),
)
FOLDER = Path("tests", "pipelines")
OUT = Path("out", "diffusers_suite")
Kind = Literal["plain", "optimised"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the tests of one file gave.

    Attributes:
        file: below `tests/pipelines`.
        tests: that were not skipped with plain transformers.
        fast: among these, the ones that called an optimised model.
        failures: with plain transformers.
        optimised_failures: with optimised ones.
        regressions: tests that pass with plain transformers alone, and what they say.
    """

    file: str
    tests: int
    fast: int
    failures: int
    optimised_failures: int
    regressions: Mapping[str, str]

    @property
    def row(self) -> str:
        """A line of a table in Markdown."""
        counts = (self.tests, self.fast, self.failures, self.optimised_failures)
        return f"| `{self.file}` | {' | '.join(map(str, counts))} | {len(self.regressions)} |"


def compare(file: str, plain: Mapping[str, Any], optimised: Mapping[str, Any]) -> Comparison:
    """Compare the outcomes of tests by their names; see `plugin.py` for what an outcome holds."""
    ran = {name: found for name, found in plain.items() if found["outcome"] != "skipped"}
    missing = {"outcome": "failed", "why": "was not run", "calls": 0}
    pairs = {name: (found, optimised.get(name, missing)) for name, found in ran.items()}
    failed = {name: pair for name, pair in pairs.items() if pair[1]["outcome"] != "passed"}
    return Comparison(
        file,
        tests=len(ran),
        fast=sum(fast.get("calls", 0) > 0 for _, fast in pairs.values()),
        failures=sum(found["outcome"] == "failed" for found in ran.values()),
        optimised_failures=len(failed),
        regressions={
            name.split("::", 1)[1]: fast.get("why", "")
            for name, (found, fast) in failed.items()
            if found["outcome"] == "passed"
        },
    )


def outcomes(checkout: Path, file: str, kind: Kind) -> Mapping[str, Any]:
    """What the tests of a file give; of an earlier run where there was one.

    Raises:
        RuntimeError: pytest came to no end.
    """
    target = (OUT / f"{file.replace('/', '.')}.{kind}.json").absolute()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        added = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        added |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "support.pipelines.plugin"]
        command += ["-p", "no:cacheprovider", "--outcomes", str(target), str(FOLDER / file)]
        command += ["--optimised"] if kind == "optimised" else []
        run = subprocess.run(
            command, cwd=checkout, env={**os.environ, **added}, capture_output=True, text=True
        )
        if not target.exists():
            raise RuntimeError(f"{file}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    found = json.loads(target.read_text())["tests"]
    assert isinstance(found, dict)
    return found


def main() -> None:
    """Run the files, print the table and every regression."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="of the repository of diffusers")
    parser.add_argument("files", nargs="*", default=FILES, help="below tests/pipelines")
    given = parser.parse_args()
    comparisons = []
    print("| tests | run | fast | failures, plain | failures, optimised | new |")
    print("|---|---|---|---|---|---|")
    for file in given.files:
        plain = outcomes(given.checkout, file, "plain")
        comparisons.append(compare(file, plain, outcomes(given.checkout, file, "optimised")))
        print(comparisons[-1].row, flush=True)
    for comparison in comparisons:
        for name, why in comparison.regressions.items():
            print(f"\n{comparison.file}::{name}\n    {why.splitlines()[0] if why else ''}")


if __name__ == "__main__":
    main()
