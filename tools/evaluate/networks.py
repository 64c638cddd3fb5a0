"""What the scoring networks make of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calicache.graph_passes.common.errors import EvaluateError, reason_of
from calicache.tools.evaluate.subject import EvaluationModel
from calicache.tools.terminal.options import import_library

_INCEPTION_FEATURES, _INCEPTION_LOGITS = 2048, "logits_unbiased"


@dataclass(frozen=True, slots=True)
class Networks:
    """The networks of FID and IS.

    Attributes:
        features: images uint8 (N, C, H, W) to (N, D).
        logits: images uint8 (N, C, H, W) to (N, K); None where IS is left out.
    """

    features: nn.Module
    logits: nn.Module | None


def networks_of(subject: EvaluationModel) -> Networks:
    """The subject's own networks, or Inception.

    Raises:
        EvaluateError: Inception is not to be had.
        LibraryError: torchmetrics is not installed.
    """
    purpose = "makes the scores"
    fid = import_library("torchmetrics.image.fid", "torchmetrics", purpose, "evaluate")
    scores = import_library("torchmetrics.image.inception", "torchmetrics", purpose, "evaluate")
    if subject.features is not None:
        return Networks(subject.features, subject.logits)
    try:
        features = fid.FrechetInceptionDistance(_INCEPTION_FEATURES).inception
        logits = subject.logits or scores.InceptionScore(_INCEPTION_LOGITS).inception
    except (ImportError, OSError, RuntimeError) as error:
        raise EvaluateError(
            "features",
            expected="torchmetrics' Inception network",
            got=reason_of(error),
            fix="Install torch-fidelity where its weights can be downloaded, or give "
            "EvaluationModel a network of your own.",
        ) from error
    return Networks(features, logits)


def apply(network: nn.Module, images: Tensor, name: str) -> Tensor:
    """What a network makes of images uint8 (N, H, W, C): float64 (N, D) on the CPU.

    Raises:
        EvaluateError: it makes something else, or values that are not finite.
    """
    device = next((value.device for value in network.parameters()), torch.device("cpu"))
    with torch.no_grad():
        result = network(images.permute(0, 3, 1, 2).contiguous().to(device))
    if not isinstance(result, Tensor) or result.ndim != 2 or len(result) != len(images):
        shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise EvaluateError(
            name,
            expected=f"a row of numbers for each of {len(images)} images",
            got=str(shape),
            fix="Let the network return (N, D).",
        )
    values = result.cpu().double()
    if not bool(values.isfinite().all()):
        raise EvaluateError(
            name,
            expected="finite numbers",
            got=f"{int((~values.isfinite()).sum())} that are not",
            fix="Mend the network: such images have no score.",
        )
    return values
