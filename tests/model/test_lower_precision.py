"""Weights cast together are those that autocast casts one by one, and so are their gradients."""

import pytest
import torch
from torch import nn

from dino_lightning.model import DINO
from dino_lightning.model.lower_precision import lowered, scaled_to
from tests.conftest import TINY_SIZES
from tests.model.test_dino import random_batch


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


class Other(nn.Linear):
    """A layer that an adapter has put in place of another."""

    def forward(self, x):
        return super().forward(x) + torch.linspace(0, 1, self.out_features)


def linear_layers(model):
    parts = (*model.encoder.layers, *model.decoder.layers)
    return [(f"{index}.{name}", layer) for index, part in enumerate(parts) for name, layer in part.named_modules()]


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_was_replaced_is_the_one_that_runs(training):
    torch.manual_seed(0)
    batch = random_batch([(64, 64)], [2])
    layers = linear_layers(DINO(num_classes=3, **TINY_SIZES))
    # torch's own attention takes the weights of its output projection without a call as well
    names = [name for name, layer in layers if isinstance(layer, nn.Linear) and not name.endswith("out_proj")]
    for name in names:
        torch.manual_seed(0)
        model = DINO(num_classes=3, **TINY_SIZES).train(training)
        torch.manual_seed(1)
        before = model(batch).pred_logits
        dict(linear_layers(model))[name].__class__ = Other
        torch.manual_seed(1)
        assert not torch.equal(model(batch).pred_logits, before), name


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_is_watched_is_called(training):
    torch.manual_seed(0)
    model = DINO(num_classes=3, **TINY_SIZES).train(training)
    seen, wanted = set(), set()
    for name, layer in linear_layers(model):
        if isinstance(layer, (nn.Linear, nn.MultiheadAttention)) and not name.endswith("out_proj"):
            wanted.add(name)
            layer.register_forward_hook(lambda *_, name=name: seen.add(name))
    model(random_batch([(64, 64)], [2]))
    assert seen == wanted
