"""What `calicache evaluate` samples and scores: the user's model, sampler and networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from calicache.graph_passes.common.errors import EvaluateError
from calicache.tools.terminal.model_file import call_in_file

Sample = Callable[[nn.Module, Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class EvaluationModel:
    """A denoiser, how images are sampled with it, and the networks that score them.

    Attributes:
        name: for the output.
        model: the denoiser, in eval mode.
        sample: images uint8 (N, H, W, C) of N seeds with the denoiser given, which is the model or
            what `optimize` made of it. Seed i gives the same image whatever else is in the batch.
        features: images uint8 (N, C, H, W) to features (N, D) for FID, in eval mode; None for
            torchmetrics' Inception network, which needs torch-fidelity and its weights.
        logits: images uint8 (N, C, H, W) to logits (N, K) for IS, in eval mode; without them there
            is no IS, but of Inception where it makes the features too.
        settings: what else decides the images, such as the steps. Images of others are refused.
    """

    name: str
    model: nn.Module
    sample: Sample
    features: nn.Module | None = None
    logits: nn.Module | None = None
    settings: Mapping[str, str | int | float] = field(default_factory=dict)


def load_subject(spec: str) -> EvaluationModel:
    """The result of a function in a file, `path/to/file.py:function`.

    Raises:
        ModelError: there is none, or it returns something else.
        EvaluateError: one of its modules is in training mode.
    """
    subject: EvaluationModel = call_in_file(
        spec, "an EvaluationModel", lambda result: isinstance(result, EvaluationModel)
    )
    for name in ("model", "features", "logits"):
        module = getattr(subject, name)
        if module is not None and any(part.training for part in module.modules()):
            raise EvaluateError(
                name,
                expected="a module in eval mode",
                got=f"{type(module).__name__} in training mode",
                fix="Call eval() on it.",
            )
    return subject


def sample_images(subject: EvaluationModel, denoiser: nn.Module, seeds: Sequence[int]) -> Tensor:
    """Images uint8 (N, H, W, C) of N seeds, on the CPU.

    Raises:
        EvaluateError: the sampler returns something else.
        CalicacheError: the plan does not cover its calls.
    """
    with torch.no_grad():
        images = subject.sample(denoiser, seeds)
    if not isinstance(images, Tensor):
        got = type(images).__name__
    elif images.dtype == torch.uint8 and images.ndim == 4 and len(images) == len(seeds):
        return images.cpu()
    else:
        got = f"{images.dtype} {tuple(images.shape)}"
    raise EvaluateError(
        "sample",
        expected=f"images uint8 ({len(seeds)}, H, W, C) of {len(seeds)} seeds",
        got=got,
        fix="Let it return these: an image for every seed, channels last.",
    )
