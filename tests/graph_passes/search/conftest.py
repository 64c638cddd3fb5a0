"""What a search knows of two small models."""

from __future__ import annotations

import pytest
import torch
from model import FashionDiT
from support.models import shake
from support.search.known import Known, TextDiT, learn

from calicache.graph_passes import Recording, record


@pytest.fixture(scope="session")
def dit_known(dit: FashionDiT, dit_recording: Recording) -> Known:
    return learn(dit, dit_recording)


@pytest.fixture(scope="session")
def text_known() -> Known:
    torch.manual_seed(0)
    model, draw = TextDiT(), torch.Generator().manual_seed(5)
    shake(model, 0.1)
    latents, text = torch.randn(2, 9, 6, generator=draw), torch.randn(2, 7, 20, generator=draw)
    with record(model) as recording, torch.no_grad():
        for now in torch.linspace(999, 0, 7).round():
            latents = latents - 0.1 * model(latents, now.expand(2), text)
    return learn(model, recording)


@pytest.fixture(params=["dit", "text"])
def known(request: pytest.FixtureRequest) -> Known:
    value = request.getfixturevalue(f"{request.param}_known")
    assert isinstance(value, Known)
    return value
