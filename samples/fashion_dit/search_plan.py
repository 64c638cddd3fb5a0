"""Search the plan that ships with the sample model; `make plan`.

    python samples/fashion_dit/search_plan.py

Records the full sampler on seeds of its own, searches under a budget of 0.35, and writes
`plan/`. The front inside holds plans for other budgets: `calicache inspect PLAN`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusion import GuidedDDIM
from model import FashionDiT
from rich.console import Console
from weights import DIT_WEIGHTS, load_weights

from calicache import Plan, Recording, record

STEPS, GUIDANCE, IMAGES = 35, 1.5, 10
SEEDS = range(21, 30)
PLAN_FOLDER = Path(__file__).parent / "plan"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PLAN_FOLDER)
    parser.add_argument("--budget", type=float, default=0.35, help="share of the full run's MACs")
    arguments = parser.parse_args()
    model = load_weights(FashionDiT(), DIT_WEIGHTS)
    console = Console(highlight=False)
    with console.status("record") as status:
        recording = record_runs(model)
        plan = Plan.search(
            model,
            recording,
            budget=arguments.budget,
            on_progress=lambda now: status.update(f"{now.stage}: {now.done:.0f}/{now.total:.0f}"),
        )
    plan.save(arguments.out)
    console.print(f"Written: {arguments.out}. Held-out error: {plan.front.held_out.mean:.4f}")


def record_runs(model: FashionDiT) -> Recording:
    """One run for every seed, of every class once."""
    sampler = GuidedDDIM(STEPS, GUIDANCE, model.null_class)
    with record(model) as recording:
        for seed in SEEDS:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(IMAGES, 1, 28, 28, generator=generator)
            recording.finish(sampler.sample(model, noise, torch.arange(IMAGES) % 10))
    return recording


if __name__ == "__main__":
    main()
