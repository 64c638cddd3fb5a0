"""The scenes sample: what captions say is what is seen, exact shapes, samplers, trainings."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import training
from autoencoder import AUTOENCODER_WEIGHTS, Autoencoder, latent_noise, load_autoencoder
from data import DEBIAN_FOLDER, Split, load_split
from flow import GuidedFlow, add_noise, flow_times
from scene_model import SceneDiT, SceneDiTConfig
from scene_scores import agreement
from scene_weights import load_scene_dit, scene_dit_files
from scenes import (
    CAPTION_LENGTH,
    CELL,
    COLOURS,
    ITEMS,
    captions,
    decode_words,
    draw_scenes,
    empty_captions,
    encode_words,
    render,
)
from support.models import relative, shake
from torch import Tensor
from train_autoencoder import AutoencoderConfig, AutoencoderTrainer, measure
from train_scenes import SceneTrainConfig, SceneTrainer, release
from weights import save_atomic

from calicache.graph_passes import Plan, optimize, record

SMALL = SceneDiTConfig(width=24, depth=2, heads=3, frequency_channels=16)
CAPTION = "red shirt top left , blue bag bottom right , on green"


needs_data = pytest.mark.skipif(
    not DEBIAN_FOLDER.exists(), reason="Debian's dataset-fashion-mnist is not installed"
)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def squares() -> Split:
    """Ten items that are full squares, each class with a grey of its own."""
    grey = (255 - 15 * torch.arange(10)).to(torch.uint8)
    return Split(grey.view(10, 1, 1).repeat(1, 28, 28), torch.arange(10))


@pytest.fixture(scope="module")
def small() -> SceneDiT:
    torch.manual_seed(0)
    return shake(SceneDiT(SMALL))


def seen_at(image: torch.Tensor, row: str, side: str) -> torch.Tensor:
    """The pixel (3,) in the middle of a quarter, in 0 .. 1."""
    top, left = (CELL * (word in ("bottom", "right")) + CELL // 2 for word in (row, side))
    return (image[:, top, left] + 1) / 2


def test_captions_say_what_is_seen(squares: Split) -> None:
    scenes = draw_scenes(squares, 64, draw())
    images = render(scenes, squares)
    counts = set()
    for image, caption in zip(images, captions(scenes), strict=True):
        *items, ground = decode_words(caption).split(" , ")
        background = 0.35 * torch.tensor(COLOURS[ground.removeprefix("on ")]) + 0.65
        quarters = {
            (row, side): background for row in ("top", "bottom") for side in ("left", "right")
        }
        for item in items:
            colour, name, row, side = item.split()
            grey = 1 - 15 / 255 * ITEMS.index(name)
            quarters[row, side] = (0.3 + 0.7 * grey) * torch.tensor(COLOURS[colour])
        counts.add((len(items), sum(value is not background for value in quarters.values())))
        for (row, side), colour_seen in quarters.items():
            # The same few float32 operations in another order.
            torch.testing.assert_close(seen_at(image, row, side), colour_seen, rtol=0, atol=1e-6)
    assert counts == {(1, 1), (2, 2), (3, 3)}  # no two items in one quarter


def test_scenes_are_their_generators_draws(squares: Split) -> None:
    one, same, other = (draw_scenes(squares, 8, draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(render(one, squares), render(same, squares))
    assert torch.equal(captions(one), captions(same))
    assert not torch.equal(captions(one), captions(other))
    assert render(one, squares).shape == (8, 3, 64, 64)
    assert captions(one).shape == (8, CAPTION_LENGTH)


def test_words_and_ids_are_each_others_inverse(squares: Split) -> None:
    ids = captions(draw_scenes(squares, 32, draw()))
    assert torch.equal(encode_words(*(decode_words(caption) for caption in ids)), ids)
    assert decode_words(encode_words(CAPTION)[0]) == CAPTION
    assert torch.equal(encode_words(""), empty_captions(1))
    with pytest.raises(ValueError, match="hat"):
        encode_words("red hat top left , on blue")


def test_latents_have_a_quarter_of_the_sides_and_unit_variance() -> None:
    model = Autoencoder()
    parameters = sum(p.numel() for p in model.parameters())
    assert 3e5 <= parameters <= 6e5
    images = torch.rand(4, 3, 64, 64, generator=draw()) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images)
    assert latents.shape == (4, 4, 16, 16)
    # Batch normalisation itself, but for its epsilon.
    assert float(latents.std(correction=0)) == pytest.approx(1.0, abs=1e-2)
    assert model.decode(latents).shape == images.shape


def test_model_is_of_the_promised_size_and_exact_in_its_shapes() -> None:
    model = SceneDiT()
    assert 6e6 <= sum(p.numel() for p in model.parameters()) <= 7e6
    with torch.no_grad():
        output = model(latent_noise(3, draw()), torch.tensor([0.0, 500.0, 1000.0]), _captions())
    assert output.shape == (3, 4, 16, 16)


def _captions() -> torch.Tensor:
    return encode_words(CAPTION, "", "purple dress top right , on red")


def test_words_matter_and_padding_does_not(small: SceneDiT) -> None:
    inputs = latent_noise(3, draw()), torch.full((3,), 300.0)
    with torch.no_grad():
        output = small(*inputs, _captions())
        swapped = small(*inputs, _captions().roll(1, 0))
        padding = small.word_embed.weight[0].clone()
        small.word_embed.weight[0] += 1.0
        other = small(*inputs, _captions())
        small.word_embed.weight[0] = padding
    assert output.isfinite().all()  # the empty caption too
    assert (output - swapped).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    assert torch.equal(output[::2], other[::2])


@pytest.mark.slow
def test_export_keeps_attention_whole(small: SceneDiT) -> None:
    inputs = latent_noise(3, draw()), torch.full((3,), 300.0), _captions()
    program = torch.export.export(small, inputs, strict=False)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert calls.count(attention) == 2 * SMALL.depth
    with torch.no_grad():
        # The same operations.
        torch.testing.assert_close(program.module()(*inputs), small(*inputs), rtol=1e-5, atol=1e-6)


def test_a_plan_that_skips_nothing_changes_nothing(small: SceneDiT) -> None:
    sampler, asked = GuidedFlow(4, 3.0), _captions()

    def sample(model: torch.nn.Module, seed: int) -> torch.Tensor:
        return sampler.sample(model, latent_noise(3, draw(seed)), asked)

    with record(small) as recording:
        sample(small, 1)
    fast = optimize(small, Plan.from_trajectory(small, recording, schedule=1))
    # Float32 rounding over four steps; what depends on the caption alone is computed once.
    assert relative(sample(fast, 2), sample(small, 2)) < 1e-5


@pytest.mark.parametrize(("order", "shift"), [(1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0)])
def test_samplers_have_their_order(order: int, shift: float) -> None:
    def growing(
        hidden_states: torch.Tensor, timestep: torch.Tensor, caption: torch.Tensor
    ) -> torch.Tensor:
        assert len(hidden_states) == len(timestep) == len(caption) == 2
        return 2.0 * hidden_states

    def error(steps: int) -> float:
        sampler = GuidedFlow(steps, 4.0, shift=shift, order=order)
        noise = torch.ones(1, 4, 16, 16, dtype=torch.float64)
        return abs(
            float(sampler.sample(growing, noise, empty_captions(1))[0, 0, 0, 0]) - math.exp(-2)
        )

    # dx/dt = 2 x from t = 1 to 0; the measured order approaches the exact one with the steps.
    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.05)


def test_any_sampler_walks_a_straight_path_in_one_step() -> None:
    latents, noise = latent_noise(2, draw(1)), latent_noise(2, draw(2))

    def perfect(
        hidden_states: torch.Tensor, timestep: torch.Tensor, caption: torch.Tensor
    ) -> torch.Tensor:
        assert timestep.tolist() == [1000.0] * 4
        assert caption.tolist() == [*_captions()[::2].tolist(), *empty_captions(2).tolist()]
        return (noise - latents).repeat(2, 1, 1, 1)

    sampler = GuidedFlow(1, 2.0)
    start = add_noise(latents, noise, torch.ones(2))
    # Three float32 additions.
    torch.testing.assert_close(
        sampler.sample(perfect, start, _captions()[::2]), latents, rtol=0, atol=1e-5
    )


def test_a_shift_spends_steps_on_the_noisy_part() -> None:
    assert flow_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert flow_times(2, shift=3.0) == [1.0, 0.75, 0.0]


def scene_trainer(data: Split) -> SceneTrainer:
    torch.manual_seed(0)
    config = SceneTrainConfig(steps=3, batch=2, warmup=1, thin_share=0.5)
    return SceneTrainer(config, data, Autoencoder().eval().requires_grad_(False), SMALL)


def autoencoder_trainer(data: Split) -> AutoencoderTrainer:
    return AutoencoderTrainer(AutoencoderConfig(steps=3, batch=2, warmup=1), data)


@pytest.mark.parametrize("make", [scene_trainer, autoencoder_trainer])
def test_training_broken_off_at_every_step_equals_training_in_one_go(
    make: Callable[[Split], training.Trainer], squares: Split, tmp_path: Path
) -> None:
    whole = make(squares)
    losses = [whole.train_step() for _ in range(3)]
    for step in range(1, 4):
        resumed = make(squares)
        over = training.run(resumed, 3, tmp_path, save_minutes=60.0, minutes=0.0)
        assert (resumed.step, over) == (step, step == 3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # The log rounds to five digits after the point.
    assert [line["loss"] for line in lines] == pytest.approx(losses, abs=2e-5)
    for name, value in whole.state().items():
        # The same operations on the same numbers; threads may sum in another order.
        torch.testing.assert_close(resumed.state()[name], value, rtol=1e-4, atol=1e-6)


def test_thin_steps_train_some_places_and_the_last_steps_all(
    squares: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = scene_trainer(squares)
    forward, counts = SceneDiT.token_velocity, []

    def watch(model: SceneDiT, tokens: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
        counts.append(tokens.shape[1])
        # A row of the table is one place: as many rows as places, none of them twice.
        assert [len(rows.unique(dim=0)) for rows in positions] == [tokens.shape[1]] * 2
        return forward(model, tokens, positions, *rest)

    monkeypatch.setattr(SceneDiT, "token_velocity", watch)
    for _ in range(3):
        trainer.train_step()
    assert counts == [64, 64, 256]


def test_order_of_places_does_not_matter_to_the_model() -> None:
    model = shake(SceneDiT(SMALL)).eval()
    latents, order = latent_noise(2, draw()), torch.randperm(256, generator=draw())
    timestep, caption = torch.tensor([100.0, 900.0]), encode_words(CAPTION, CAPTION)
    tokens = latents.flatten(2).transpose(1, 2)
    with torch.no_grad():
        expected = model(latents, timestep, caption).flatten(2).transpose(1, 2)
        actual = model.token_velocity(
            tokens[:, order], model.positions[:, order], timestep, caption
        )
    # Attention sums over places in another order: float32 rounding.
    torch.testing.assert_close(actual, expected[:, order], rtol=1e-4, atol=1e-5)


def test_a_release_is_the_moving_average_in_two_files(squares: Split, tmp_path: Path) -> None:
    trainer = SceneTrainer(SceneTrainConfig(batch=1), squares, Autoencoder().eval())
    trainer.step = 7
    save_atomic(trainer.state(), tmp_path / training.CHECKPOINT)
    assert release(tmp_path, tmp_path / "weights") == 7
    files = scene_dit_files(tmp_path / "weights")
    assert all(5e6 < path.stat().st_size < 8e6 for path in files)
    loaded = load_scene_dit(tmp_path / "weights").state_dict()
    for name, value in trainer.average.state_dict().items():
        # Float16 has eleven bits, and 6e-8 is its smallest step.
        torch.testing.assert_close(loaded[name], value, rtol=2**-11, atol=6e-8)


@pytest.mark.slow
@needs_data
def test_autoencoder_is_as_good_as_its_record_says() -> None:
    recorded = json.loads(AUTOENCODER_WEIGHTS.with_suffix(".json").read_text())
    figures = measure(load_autoencoder(), load_split(train=False))
    assert recorded["psnr"] >= 26.0
    # The same scenes and noise; float32 convolutions differ between processors.
    assert figures == pytest.approx({name: recorded[name] for name in figures}, abs=0.02)


@needs_data
def test_scores_see_what_real_scenes_show() -> None:
    test = load_split(train=False)
    scenes = draw_scenes(test, 64, draw())
    images = render(scenes, test)
    right, wrong = agreement(images, scenes), agreement(images.roll(1, 0), scenes)
    # The classifier's accuracy is 0.92 on items that are in their photographs' middle.
    assert right.backgrounds == 1.0
    assert right.colours > 0.95
    assert right.classes > 0.8
    # Of six colours or ten classes one is right by chance, and half of the quarters are empty.
    assert max(wrong.backgrounds, wrong.colours, wrong.classes) < 0.4


def test_weights_are_small_and_load_when_present() -> None:
    files = [path for path in (AUTOENCODER_WEIGHTS, *scene_dit_files()) if path.exists()]
    assert all(path.stat().st_size <= 12e6 for path in files)
    assert not load_autoencoder().training
    if len(files) < 3:
        pytest.skip("the transformer's weights are not there yet")
    model = load_scene_dit()
    assert all(value.isfinite().all() for value in model.state_dict().values())
