"""The feed-forward network says what its two layers say, and learns what they learn."""

import pytest
import torch
from torch import nn

from dino_lightning.model.feed_forward import feed_forward


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 8), (2, 5, 8), (0, 3, 8)])
def test_two_layers(dtype, shape):
    torch.manual_seed(0)
    first, second = nn.Linear(8, 16), nn.Linear(16, 8)
    x = torch.randn(shape, requires_grad=True)
    results = []
    for ours in (True, False):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            out = feed_forward(x, first, second, nn.Dropout(0.0)) if ours else second(first(x).relu())
        inputs = [x, *first.parameters(), *second.parameters()]
        results.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_numerical_gradients():
    torch.manual_seed(0)
    first, second = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    inputs = [x, *first.parameters(), *second.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: feed_forward(x, first, second, nn.Dropout(0.0)), inputs)


def test_dropout_takes_part_in_training_alone():
    torch.manual_seed(0)
    first, second, dropout = nn.Linear(8, 1000), nn.Linear(1000, 8), nn.Dropout(0.5)
    x = torch.randn(2, 8)
    plain = second(first(x).relu())
    assert not torch.allclose(feed_forward(x, first, second, dropout.train()), plain)
    torch.testing.assert_close(feed_forward(x, first, second, dropout.eval()), plain)
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(x, first, second, dropout), plain)
