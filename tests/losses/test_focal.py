"""The focal loss with its gradient by hand, beside torchvision's in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import sigmoid_focal_loss

from dino_lightning.losses.focal import focal_loss


def both(logits, positive, counts):
    """Loss and gradient of ours and of torchvision's formula."""
    layers, places = len(logits), logits[0].numel()
    wanted = torch.zeros(layers, places, dtype=torch.float64)
    wanted.scatter_add_(1, positive, counts.double())
    weights = torch.arange(1.0, layers + 1)
    results = []
    for x, ours in ((logits.clone(), True), (logits.double(), False)):
        x.requires_grad_()
        if ours:
            loss = focal_loss(x, positive, counts)
        else:
            loss = sigmoid_focal_loss(x, wanted.view_as(x), alpha=0.25, gamma=2).flatten(1).sum(1)
        (gradient,) = torch.autograd.grad((loss * weights.to(loss.dtype)).sum(), x)
        results.append((loss.detach().double(), gradient.double()))
    return results


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32), st.floats(0.1, 12))
def test_loss_and_gradient_are_those_of_the_formula(layers, queries, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, queries, classes, generator=generator) * scale - scale
    count = min(queries * classes, 7)
    positive = torch.stack([torch.randperm(queries * classes, generator=generator)[:count] for _ in range(layers)])
    counts = torch.rand(layers, count, generator=generator) < 0.7
    (loss, gradient), (expected, expected_gradient) = both(logits, positive, counts)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [-1e4, -200.0, -90.0, 0.0, 84.0, 90.0, 200.0, 1e4])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_logits_have_the_right_loss_and_a_finite_gradient(value, right):
    logits = torch.full((1, 1, 1), value)
    (loss, gradient), (expected, expected_gradient) = both(logits, torch.zeros(1, 1).long(), torch.tensor([[right]]))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_no_boxes_and_repeated_places_that_do_not_count():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    for positive, counts in (
        (torch.zeros(2, 0).long(), torch.zeros(2, 0).bool()),
        (torch.zeros(2, 3).long(), torch.tensor([[True, False, False], [False, False, False]])),
    ):
        (loss, gradient), (expected, expected_gradient) = both(logits, positive, counts)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        assert not focal_loss(torch.randn(1, 4, 2), torch.zeros(1, 1).long(), torch.ones(1, 1).bool()).requires_grad
