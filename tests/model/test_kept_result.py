"""What is kept from step to step is computed again as soon as it could be another."""

import copy

import pytest
import torch
from torch import nn

from dino_lightning.model import DINO
from dino_lightning.model.backbone import Backbone
from dino_lightning.training.memory import estimated_peak
from tests.conftest import TINY_SIZES
from tests.model.test_dino import random_batch

IMAGE = torch.rand(1, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def frozen_backbone():
    torch.manual_seed(0)
    return Backbone(name="resnet10", strides=[32], norm="frozen", trainable_layers=1).double().eval()


def unfolded(backbone):
    """The same network by plain convolutions and norms of torch."""
    plain = Backbone(name="resnet10", strides=[32], norm="batch", trainable_layers=0)
    plain.to(next(backbone.parameters()).dtype).load_state_dict(backbone.state_dict(), strict=False)
    return plain.eval()


def write_to_a_statistic(backbone):
    backbone.body.bn1.running_mean.add_(1.0)


def write_to_a_frozen_weight(backbone):
    with torch.no_grad():
        backbone.body.conv1.weight.mul_(2.0)


def load_another(backbone):
    state = {name: value * 1.5 for name, value in backbone.state_dict().items()}
    backbone.load_state_dict(state)


def assign_another(backbone):
    state = {name: value * 1.5 for name, value in backbone.state_dict().items()}
    backbone.load_state_dict(state, assign=True)


def set_by_vector(backbone):
    vector = nn.utils.parameters_to_vector(backbone.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, backbone.parameters())


@pytest.mark.parametrize(
    "change", [write_to_a_statistic, write_to_a_frozen_weight, load_another, assign_another, set_by_vector]
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_change_of_a_frozen_layer_is_seen(change, mode):
    backbone = frozen_backbone()
    with mode():
        before = backbone(IMAGE)[0]
    change(backbone)
    with mode():
        after = backbone(IMAGE)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, unfolded(backbone)(IMAGE)[0])


def test_a_frozen_layer_in_another_type_and_in_a_copy():
    backbone = frozen_backbone()
    backbone(IMAGE)
    copied = copy.deepcopy(backbone)
    write_to_a_frozen_weight(copied)
    torch.testing.assert_close(copied(IMAGE)[0], unfolded(copied)(IMAGE)[0])
    torch.testing.assert_close(backbone(IMAGE)[0], unfolded(backbone)(IMAGE)[0])
    backbone.float()
    torch.testing.assert_close(backbone(IMAGE.float())[0], unfolded(backbone)(IMAGE.float())[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_follows_inference(mode):
    """What was computed without gradients can be used with them."""
    torch.manual_seed(0)
    model = DINO(num_classes=3, **TINY_SIZES | {"backbone_norm": "frozen", "backbone": "resnet10"})
    batch = random_batch([(64, 64), (64, 64)], [1, 2])
    with mode():
        model.eval()(batch)
    model.train()(batch).pred_logits.sum().backward()
    assert model.backbone.body.layer4[0].conv1.weight.grad.abs().sum() > 0


def test_places_of_a_canvas_are_those_of_its_own_size():
    """Unpadded batches of one size share their places; another size, a padded batch and the first again get theirs."""
    torch.manual_seed(0)
    model = DINO(num_classes=3, **TINY_SIZES).eval()
    kinds = [[(64, 96)], [(96, 64)], [(64, 96), (96, 64)], [(64, 96)], [(64, 96)] * 2]
    with torch.no_grad():
        first = [model(random_batch(sizes, [1] * len(sizes))).pred_boxes for sizes in kinds]
        for sizes, boxes in zip(reversed(kinds), reversed(first), strict=True):
            fresh = DINO(num_classes=3, **TINY_SIZES).eval()
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(fresh(random_batch(sizes, [1] * len(sizes))).pred_boxes, boxes)
    assert torch.equal(first[0], first[3])
    torch.testing.assert_close(first[4][:, 0], first[0][:, 0])


def test_an_estimate_of_memory_leaves_nothing_behind():
    """It runs the model on tensors that only have shapes."""
    torch.manual_seed(0)
    model = DINO(num_classes=3, **TINY_SIZES | {"backbone_norm": "frozen", "backbone": "resnet10"}).train()
    batch = random_batch([(64, 64)], [2])
    estimated_peak(model, batch)
    model(batch).pred_boxes.sum().backward()
    estimated_peak(model, batch)
