"""Weights cast together are those that autocast casts one by one, and so are their gradients."""

import pytest
import torch

from dino_lightning.model.lower_precision import lowered, scaled_to


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lowered_weights_and_their_gradients(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(2, 5)]
    with torch.autocast("cpu", dtype):
        first, second, frozen = lowered(*weights)
    assert first.dtype == second.dtype == frozen.dtype == dtype
    for low, weight in zip((first, second, frozen), weights, strict=True):
        assert torch.equal(low, weight.to(dtype))
    (first.sum() * 3).backward()  # the second takes no part
    assert torch.equal(weights[0].grad, torch.full((3, 4), 3.0))
    assert weights[0].grad.dtype == torch.float32
    assert weights[1].grad is None or not weights[1].grad.any()
    assert weights[2].grad is None


def test_weights_stay_what_they_are_without_autocast():
    weights = (torch.randn(3, requires_grad=True), torch.randn(3, dtype=torch.float64))
    assert all(one is other for one, other in zip(lowered(*weights), weights, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert lowered(*weights)[1].dtype == torch.float64


def test_scaled_weight_is_rounded_once():
    torch.manual_seed(0)
    weight, scale = torch.randn(8, 4, 3, 3, requires_grad=True), torch.rand(8, 1, 1, 1)
    grad = torch.randn(8, 4, 3, 3).bfloat16()
    scaled = scaled_to(weight, scale, torch.bfloat16)
    assert torch.equal(scaled, (weight * scale).bfloat16())
    (ours,) = torch.autograd.grad(scaled, weight, grad)
    assert torch.equal(ours, grad.float() * scale)
    assert torch.equal(scaled_to(weight, scale, torch.float32), weight * scale)
