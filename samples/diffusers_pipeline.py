"""Text to image with a diffusers pipeline: optimise its transformer, then run it in ONNX Runtime.

The weights are random and tiny, so that it runs anywhere without a download; with a trained
PixArt-alpha the same lines hold, but for the first one of `main`. Writes `out/pixart.png`:
the original's image, the optimised transformer's, and ONNX Runtime's.

python samples/diffusers_pipeline.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline
from PIL import Image
from tiny_pixart import tiny_pixart
from torch import Tensor, nn

from calicache import Plan, Session, export_onnx, optimize, record

STEPS = 20


class OnnxTransformer(nn.Module):
    """An ONNX session in the place of a pipeline's transformer.

    Attributes:
        config, dtype, device: what the pipeline reads of its transformer.
    """

    def __init__(self, session: Session, original: nn.Module) -> None:
        super().__init__()
        self.session, self.step = session, 0
        self.config, self.dtype = original.config, original.dtype
        self.device = torch.device("cpu")

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor]:
        """One step; what is not a tensor was fixed when the plan was recorded."""
        tensors = {name: value for name, value in arguments.items() if torch.is_tensor(value)}
        output = self.session.step(self.step, hidden_states=hidden_states, **tensors)
        self.step = (self.step + 1) % STEPS
        return (torch.from_numpy(output),)


def generate(pipe: PixArtAlphaPipeline, prompt: str, seed: int) -> Tensor:
    """One image (H, W, 3) in 0 .. 1, with the pipeline's own guidance."""
    images = pipe(
        prompt,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(seed),
        clean_caption=False,
        output_type="np",
    ).images
    return torch.from_numpy(images[0])


def compare(name: str, image: Tensor, expected: Tensor) -> None:
    """Print how far an image is from the original's."""
    error = float((image - expected).norm() / expected.norm())
    noise = max(float((image - expected).square().mean()), 1e-12)
    print(f"{name}: relative error {error:.6f}, PSNR {-10 * math.log10(noise):.1f} dB")


def save(images: list[Tensor], path: Path) -> None:
    """Write the images side by side as one PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = torch.cat(images, dim=1).mul(255).round().to(torch.uint8)
    Image.fromarray(row.numpy()).save(path)
    print(f"wrote {path}")


def main(out: Path = Path("out")) -> None:
    """Record, plan, optimise, sample, export, sample again."""
    pipe = tiny_pixart()
    original = pipe.transformer
    prompt, seed = "A lighthouse in the snow", 1  # not the ones that are recorded
    full = generate(pipe, prompt, seed)

    with record(original) as recording:
        generate(pipe, "A photo of a cat", seed=2)
    plan = Plan.from_trajectory(original, recording, schedule=3, rank=16)
    optimized = optimize(original, plan)
    print(
        f"MACs of a run: {optimized.compiled.cost.run_share(plan.schedule):.2f} of the original's"
    )

    pipe.transformer = optimized
    fast = generate(pipe, prompt, seed)
    compare("PyTorch", fast, full)

    folder = out / "pixart.onnx.d"
    export_onnx(optimized, folder, layout="step")
    size = sum(file.stat().st_size for file in folder.iterdir())
    weights = sum(parameter.nbytes for parameter in original.parameters())
    print(f"ONNX: {size / 1e6:.1f} MB, the original's weights: {weights / 1e6:.1f} MB")

    pipe.transformer = OnnxTransformer(Session(folder), original)
    exported = generate(pipe, prompt, seed)
    compare("ONNX Runtime", exported, full)
    save([full, fast, exported], out / "pixart.png")


if __name__ == "__main__":
    main()
