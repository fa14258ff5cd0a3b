"""The class losses beside their papers' formulas, written out in float64 and differentiated by PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning.boxes import paired_generalized_iou, paired_iou
from dino_lightning.losses import Criterion
from dino_lightning.losses.class_losses import CLASS_LOSSES, SMALLEST_TARGET, class_loss
from dino_lightning.structures import ModelOutput, pad_targets

NEW = [name for name in CLASS_LOSSES if name != "focal"]


def bce(x, target):
    return target * F.softplus(-x) + (1 - target) * F.softplus(x)


def by_the_formula(name, logits, positive, counts, quality, images):
    """(L,) in float64, entry by entry."""
    losses = []
    for layer in range(len(logits)):
        flat = logits[layer].flatten()
        places = dict(zip(positive[layer].tolist(), range(positive.shape[1]), strict=True)) if positive.numel() else {}
        per_image = positive.shape[1] // images
        total = flat.new_zeros(())
        for place in range(len(flat)):
            x, p = flat[place], flat[place].sigmoid()
            row = next((row for other, row in places.items() if other == place and counts[layer, row]), None)
            if row is None:
                weight, gamma = (0.75, 2) if name == "varifocal" else (1, 1.5) if name == "matchability" else (1, 2)
                total = total + weight * p**gamma * bce(x, 0.0)
                continue
            q, fixed = float(quality[layer, row]), float(p.detach())
            first = row // per_image * per_image
            here = slice(first, first + per_image)
            best = max(float((quality[layer, here] * counts[layer, here]).max()), SMALLEST_TARGET)
            target = {
                "quality_focal": q,
                "varifocal": q,
                "ia_bce": fixed**0.25 * q**0.75,
                "position_supervised": q**2 / best,
                "matchability": q**1.5,
            }[name]
            target = min(max(target, SMALLEST_TARGET), 1.0)
            weight = {"varifocal": target, "ia_bce": 1.0, "matchability": 1.0}.get(name, (target - p) ** 2)
            total = total + weight * bce(x, target)
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize("name", NEW)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.integers(0, 2**32), st.floats(0.1, 8))
def test_loss_and_gradient_are_those_of_the_formula(name, layers, queries, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, queries, classes, generator=generator) * scale - scale
    count = min(queries * classes, 6) // 2 * 2  # two images with as many places each
    positive = torch.stack([torch.randperm(queries * classes, generator=generator)[:count] for _ in range(layers)])
    counts = torch.rand(layers, count, generator=generator) < 0.7
    quality = torch.rand(layers, count, generator=generator)
    weights = torch.arange(1.0, layers + 1)
    ours, reference = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = class_loss(name, ours, positive, counts, quality, images=2 if count else 1)
    expected = by_the_formula(name, reference, positive, counts, quality.double(), 2 if count else 1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), ours)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), reference)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("value", [-1e4, -90.0, 0.0, 90.0, 1e4])
def test_extreme_logits_have_a_finite_loss_and_gradient(name, value):
    logits = torch.full((1, 2, 1), value, requires_grad=True)
    loss = class_loss(name, logits, torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), torch.full((1, 1), 0.5))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", NEW)
def test_without_boxes_everything_is_background(name):
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    nothing = torch.zeros(2, 0)
    loss = class_loss(name, logits, nothing.long(), nothing.bool(), nothing, images=4)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert (loss > 0).all() and (gradient > 0).all()


@pytest.mark.parametrize("name", NEW)
def test_a_better_box_earns_a_higher_score(name):
    """Two queries with the same logit: the gradient pushes that of the tighter box up more."""
    logits = torch.zeros(1, 2, 1, requires_grad=True)
    places, counts = torch.tensor([[0, 1]]), torch.ones(1, 2).bool()
    class_loss(name, logits, places, counts, torch.tensor([[0.9, 0.6]])).sum().backward()
    assert logits.grad[0, 0, 0] < logits.grad[0, 1, 0]


def test_a_loss_that_does_not_exist_is_refused_with_the_names():
    with pytest.raises(ValueError, match="class_loss='vocal': choose one of focal, quality_focal, varifocal"):
        Criterion(class_loss="vocal")
    with pytest.raises(ValueError, match="needs the quality"):
        class_loss("varifocal", torch.zeros(1, 1, 1), torch.zeros(1, 1).long(), torch.ones(1, 1).bool())


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_the_criterion_uses_it_and_a_perfect_prediction_costs_next_to_nothing(name):
    targets = pad_targets([(torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.2, 0.4]]), torch.tensor([0, 1]))])
    boxes = torch.cat((targets.boxes_cxcywh, torch.full((1, 1, 4), 0.5)), 1)[None].expand(3, -1, -1, -1)
    logits = torch.full((3, 1, 3, 2), -12.0)
    logits[:, :, 0, 0] = logits[:, :, 1, 1] = 12.0
    output = ModelOutput(
        pred_logits=logits[:2], pred_boxes=boxes[:2], encoder_logits=logits[2], encoder_boxes=boxes[2], denoising=None
    )
    good = Criterion(class_loss=name, weight_class=2.0)(output, targets)
    assert set(good) >= {"loss", "loss_class", "loss_class_0", "loss_class_encoder"}
    assert float(good["loss_class"]) < 1e-3
    bad = ModelOutput(
        pred_logits=-logits[:2], pred_boxes=boxes[:2], encoder_logits=logits[2], encoder_boxes=boxes[2], denoising=None
    )
    assert float(Criterion(class_loss=name)(bad, targets)["loss_class"]) > 1


@given(st.integers(0, 2**32))
@settings(deadline=None)
def test_paired_iou_is_between_the_generalised_one_and_1(seed):
    generator = torch.Generator().manual_seed(seed)
    corner, size = (torch.rand(2, 5, 2, generator=generator) * 50 for _ in range(2))
    corners = torch.cat((corner, corner + size + 1), 2)
    iou, generalised = paired_iou(*corners), paired_generalized_iou(*corners)
    assert (iou >= 0).all() and (iou <= 1).all() and (generalised <= iou + 1e-6).all()
    torch.testing.assert_close(paired_iou(corners[0], corners[0]), torch.ones(5), atol=1e-5, rtol=0)
