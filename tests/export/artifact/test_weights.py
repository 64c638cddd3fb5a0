"""The weight file: what is in it, where; equal contents."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir import tensor_adapters

from calicache.export.artifact.weights import (
    LINE,
    PAGE,
    SMALL,
    fingerprint,
    place_outside,
    plan_weight_file,
    same_content,
)

COUNT = SMALL // 4 + 1  # float32 values of the smallest tensor in the file


def tensor(*values: float, count: int = COUNT) -> ir.Tensor:
    return ir.tensor(np.resize(np.array(values, np.float32), count))


def model(**tensors: ir.TensorProtocol) -> ir.Model:
    values = [
        ir.Value(
            name=name,
            type=ir.TensorType(content.dtype),
            shape=ir.Shape(content.shape.numpy()),
            const_value=content,
        )
        for name, content in tensors.items()
    ]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values), ir_version=10)


def test_large_tensors_lie_in_the_file_and_small_ones_stay(tmp_path: Path) -> None:
    one, two, small = tensor(1, 2), tensor(3, 4, count=COUNT + 5), tensor(5, count=COUNT - 1)
    models = [model(a=one, s=small), model(a=one, b=two)]
    file = plan_weight_file(models)
    path = tmp_path / "weights.bin"
    file.write(path)
    place_outside(models, file, path)
    content = path.read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256)
    assert set(file.places) == {"a", "b"}
    assert all(place % LINE == 0 for place in file.places.values())
    assert not isinstance(models[0].graph.initializers["s"].const_value, ir.ExternalTensor)
    for name, expected in (("a", one), ("b", two)):
        outside = models[1].graph.initializers[name].const_value
        assert isinstance(outside, ir.ExternalTensor)
        assert np.array_equal(outside.numpy(), expected.numpy())


def test_what_fills_a_page_can_be_mapped() -> None:
    page = tensor(1, count=PAGE // 4)
    file = plan_weight_file([model(a=tensor(2), b=tensor(3), c=page)])
    assert file.places["c"] % PAGE == 0
    assert file.size == PAGE + page.nbytes


def test_the_order_of_the_file_is_that_of_the_contents() -> None:
    contents = [tensor(k) for k in range(4)]
    forwards = plan_weight_file([model(**{f"w{k}": c for k, c in enumerate(contents)})])
    backwards = plan_weight_file([model(**{f"v{k}": c for k, c in enumerate(contents[::-1])})])
    assert forwards.sha256 == backwards.sha256
    assert forwards.sha256 != plan_weight_file([model(w=tensor(0))]).sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.bool])
def test_equal_tensors_have_equal_fingerprints(dtype: torch.dtype) -> None:
    values = torch.randn(300, 70).to(dtype)
    one, two = (tensor_adapters.TorchTensor(v) for v in (values, values.clone()))
    assert fingerprint(one) == fingerprint(two)
    assert same_content(one, two)
    changed = values.clone()
    changed[0, 0] = not changed[0, 0] if dtype is torch.bool else changed[0, 0] + 1
    assert fingerprint(tensor_adapters.TorchTensor(changed)) != fingerprint(one)
    assert not same_content(one, tensor_adapters.TorchTensor(changed))
    reshaped = tensor_adapters.TorchTensor(values.reshape(70, 300))
    assert fingerprint(reshaped) != fingerprint(one)
    assert not same_content(one, reshaped)


def test_a_change_that_a_fingerprint_misses_is_seen() -> None:
    values = np.zeros(1 << 20, np.float32)
    changed = values.copy()
    changed[5001] = 1
    assert fingerprint(ir.tensor(values)) == fingerprint(ir.tensor(changed))
    assert not same_content(ir.tensor(values), ir.tensor(changed))
