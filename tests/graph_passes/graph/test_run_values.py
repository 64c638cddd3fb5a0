"""Values of the run: found, kept by REFRESH, read by the cheap modes, exact in every runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.artifacts import kept_refreshes
from torch import Tensor, nn
from torch.nn import functional as F

from calicache.export import Session, export_onnx, read_sampler
from calicache.graph_passes import Plan, Recording, StepMode, optimize, record, uniform_schedule
from calicache.graph_passes.api.runtime import OptimizedModel
from calicache.graph_passes.graph.macs import graph_macs

TOKENS, TEXT, WIDTH, STEPS = 6, 5, 8, 6


class CrossBlock(nn.Module):
    """Self-attention to the text alone, then an MLP; both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        heads = (
            t.unflatten(2, (2, -1)).transpose(1, 2) for t in (self.q(x), self.k(text), self.v(text))
        )
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.fc2(F.gelu(self.fc1(F.layer_norm(x, (WIDTH,)))))


class TextDiT(nn.Module):
    """Two blocks; the text goes through a projection of its own, the label through a table."""

    def __init__(self) -> None:
        super().__init__()
        self.caption, self.time = nn.Linear(WIDTH, WIDTH), nn.Linear(1, WIDTH)
        self.labels = nn.Embedding(3, WIDTH)
        self.blocks = nn.ModuleList(CrossBlock() for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, label: Tensor) -> Tensor:
        text = F.silu(self.caption(text))
        condition = F.silu(self.time(timestep[:, None] / 1000)) + self.labels(label)
        hidden = x + condition[:, None]
        for block in self.blocks:
            hidden = block(hidden, text)
        return hidden


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return TextDiT().eval()


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(2, TEXT, WIDTH, generator=generator)
    return {
        "x": torch.randn(2, TOKENS, WIDTH, generator=generator),
        "text": text,
        "label": torch.tensor([0, 2]),
    }


def sample(model, seed: int) -> Tensor:
    inputs = draw(seed)
    x = inputs.pop("x")
    with torch.no_grad():
        for k in range(STEPS):
            timestep = torch.full((2,), 900.0 - 100 * k)
            x = 0.9 * x - 0.1 * model(x=x, timestep=timestep, **inputs)
    return x


@pytest.fixture(scope="module")
def recording(model: nn.Module) -> Recording:
    with record(model) as recording:
        for seed in (1, 2):  # two texts: the recording tells that they change from run to run
            recording.finish(sample(model, seed))
    return recording


def optimised(model, recording, mode=StepMode.CALIBRATE, **options) -> OptimizedModel:
    schedule = uniform_schedule(STEPS, 3, mode)
    settings = {"rank": WIDTH, "order": 2, "correct": False, **options}
    return optimize(model, Plan.from_trajectory(model, recording, schedule=schedule, **settings))


@pytest.fixture(scope="module")
def fast(model, recording) -> OptimizedModel:
    return optimised(model, recording)


def run_caches(fast: OptimizedModel) -> list:
    return [cache for cache in fast.compiled.variant_set.caches if cache.history == 1]


@pytest.mark.slow
def test_keys_and_values_of_the_text_are_kept_once(fast: OptimizedModel) -> None:
    kept = run_caches(fast)
    assert len(kept) == 4  # k and v of two blocks; the caption's own projection is behind them
    assert {cache.shape for cache in kept} == {(2 * TEXT, WIDTH)}
    slots = fast.compiled.variant_set.slots()
    assert all(f"{cache.name}_back1" not in slots for cache in kept)
    others = [cache for cache in fast.compiled.variant_set.caches if cache not in kept]
    assert all(f"{cache.name}_back2" in slots for cache in others)


def test_cheap_modes_make_no_product_of_the_text(fast: OptimizedModel) -> None:
    reads = fast.compiled.variant_set.variants[StepMode.CALIBRATE].reads
    assert {cache.name for cache in run_caches(fast)} <= set(reads)
    graph = fast.compiled.variant_set.variants[StepMode.CALIBRATE].module.graph
    weights = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    assert not {name for name in weights if ".k." in name or ".v." in name or "caption" in name}
    assert any(name.startswith("labels") for name in weights)  # costs no product: left in place


def test_cost_counts_what_is_saved_and_kept(fast: OptimizedModel) -> None:
    graph = fast.compiled.variant_set.variants[StepMode.CALIBRATE].module.graph
    assert fast.compiled.cost.modes[StepMode.CALIBRATE] == graph_macs(graph)
    held = sum(cache.nbytes for cache in run_caches(fast))
    others = sum(c.nbytes for c in fast.compiled.variant_set.caches if c.history == 3)
    assert fast.compiled.cost.cache_bytes == held + 3 * others


@pytest.mark.slow
@pytest.mark.parametrize("mode", [StepMode.CALIBRATE, StepMode.REUSE])
@pytest.mark.parametrize("order", [0, 2])
def test_full_rank_is_exact_with_another_text_in_every_run(
    model, recording, mode: StepMode, order: int
) -> None:
    fast = optimised(model, recording, mode, order=order)
    for seed in (3, 4):
        latents, exact = sample(fast, seed), sample(model, seed)
        if mode is StepMode.CALIBRATE:
            # float32, every layer as a product of two factors, over 6 steps.
            torch.testing.assert_close(latents, exact, rtol=1e-3, atol=1e-4)
        else:
            assert (latents - exact).norm() < 0.2 * exact.norm()


@pytest.mark.slow
def test_kept_values_do_not_pile_up(model, recording) -> None:
    fast = optimised(model, recording)
    sample(fast, 3)
    (state,) = fast.state.calls  # one call a step
    names = {cache.name for cache in run_caches(fast)}
    assert {len(state.kept[name]) for name in names} == {1}
    assert max(map(len, state.kept.values())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["step", "pair"])
def test_sessions_agree_with_torch(fast, layout: str, tmp_path) -> None:
    export_onnx(fast, tmp_path / layout, layout=layout)
    session = Session(tmp_path / layout)
    steps = iter(range(STEPS))

    def denoise(**tensors: Tensor) -> Tensor:
        return torch.from_numpy(session.step(next(steps), **tensors))

    fast.reset()
    expected = sample(fast, 5)
    # float32 in two runtimes, over 6 steps.
    torch.testing.assert_close(sample(denoise, 5), expected, rtol=1e-4, atol=1e-5)
    names = {cache.name for cache in run_caches(fast)}
    assert all(not names & set(kept) for kept in kept_refreshes(session)[1:])


@pytest.mark.slow
def test_sampler_agrees_with_torch(fast, recording, tmp_path) -> None:
    export_onnx(fast, tmp_path / "run", layout="sampler", sampler=read_sampler(fast, recording))
    inputs = draw(5)
    latents = Session(tmp_path / "run").sample(inputs.pop("x"), **inputs)
    fast.reset()
    np.testing.assert_allclose(latents, sample(fast, 5), rtol=1e-4, atol=1e-5)
