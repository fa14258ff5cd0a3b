"""Products with weights at inference on a CPU: the same numbers as by PyTorch's own choice of library."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dino_lightning.model import linear as module
from dino_lightning.model.feed_forward import ROWS_AT_A_TIME, feed_forward
from dino_lightning.model.linear import linear, takes_onednn


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [None, draw(24)])
def test_at_inference_as_in_float64(bias, relu):
    x, weight = draw(2, 3, 40), draw(24, 40)
    with torch.no_grad():
        actual = linear(x, weight, bias, relu=relu)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert actual.shape == (2, 3, 24) and actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.clamp(min=0) if relu else expected, rtol=1e-5, atol=1e-5)


def test_only_what_needs_no_gradient_in_float32_is_taken_from_pytorch(monkeypatch):
    monkeypatch.setattr(module, "_has_both", lambda: True)
    x, weight = draw(3, 8), draw(4, 8).requires_grad_()
    assert not takes_onednn(x, weight)
    linear(x, weight).sum().backward()
    assert torch.allclose(weight.grad, x.sum(0).expand(4, -1))
    with torch.no_grad():
        assert takes_onednn(x, weight)
        assert not takes_onednn(x.double(), weight.double())
        assert not takes_onednn(x[:0], weight)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not takes_onednn(x, weight)


def test_the_feed_forward_network_has_all_rows_in_their_order():
    x = draw(2, ROWS_AT_A_TIME - 3, 8)
    first, second, dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.0)
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(x, first, second, dropout), second(F.relu(first(x))))
