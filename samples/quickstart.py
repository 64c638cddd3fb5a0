"""Five minutes with calicache: optimise a model, look at it, run it in ONNX Runtime.

python samples/quickstart.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "fashion_dit"))

from diffusion import GuidedDDIM
from model import FashionDiT
from weights import DIT_WEIGHTS, load_weights

from calicache import Plan, Session, export_onnx, optimize, record


def main(out: Path = Path("out")) -> None:
    """Optimise the sample DiT and compare it with the original, in PyTorch and ONNX Runtime."""
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    sampler = GuidedDDIM(steps=20, guidance=1.5, null_class=model.null_class)
    noise, labels = torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 7, 8])

    with record(model) as recording:  # the sampler is not changed
        full = sampler.sample(model, noise, labels)

    plan = Plan.from_trajectory(model, recording, schedule=3, rank=32)
    fast = optimize(model, plan)  # a drop-in: same call, same return type
    images = sampler.sample(fast, noise, labels)
    print(f"relative error in PyTorch: {float((images - full).norm() / full.norm()):.4f}")

    export_onnx(fast, out / "quickstart.onnx.d")
    session = Session(out / "quickstart.onnx.d")
    step = iter(range(20))
    images = sampler.sample(
        lambda **inputs: torch.from_numpy(session.step(next(step), **inputs)), noise, labels
    )
    print(f"relative error in ONNX Runtime: {float((images - full).norm() / full.norm()):.4f}")


if __name__ == "__main__":
    main()
