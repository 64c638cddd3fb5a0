"""Export the Fashion DiT's searched plan as one model: noise in, images out, 35 steps inside.

    python samples/whole_run.py

Writes `out/run.onnx.d`, which `samples/node` and `samples/cpp` run without Python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "fashion_dit"))

from model import FashionDiT
from search_plan import PLAN_FOLDER
from weights import DIT_WEIGHTS, load_weights

from calicache import Plan, export_onnx, optimize


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/run.onnx.d"))
    export_run(parser.parse_args().out)


def export_run(out: Path) -> None:
    """Write the artifact: ten images, one of every class, guided."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    export_onnx(optimize(model, Plan.load(PLAN_FOLDER)), out, layout="sampler")


if __name__ == "__main__":
    main()
