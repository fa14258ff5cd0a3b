"""Further groups of queries in training: invisible to the first, matched on their own, absent in inference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dino_lightning import DINO
from dino_lightning.losses import Criterion
from dino_lightning.structures import Batch
from dino_lightning.weights.loading import load_weights

SIZES = {"num_classes": 2, "backbone": "resnet10", "hidden_dim": 16, "num_heads": 2, "num_encoder_layers": 1,
         "num_decoder_layers": 2, "ffn_dim": 16, "num_queries": 7, "num_feature_levels": 3}  # fmt: skip


def model(**options) -> DINO:
    torch.manual_seed(1)
    return DINO(**SIZES, **options)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(2)]
    boxes = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]])
    return Batch.from_images(images, targets=[(boxes, torch.tensor([0, 1])), (boxes[:1], torch.tensor([1]))])


@pytest.mark.parametrize("num_denoising", [0, 100])
def test_the_first_group_does_not_see_the_others(batch, num_denoising):
    detector = model(query_groups=3, num_denoising=num_denoising).train()

    def output():
        torch.manual_seed(5)
        return detector(batch)

    before = output()
    torch.nn.init.normal_(detector.group_queries.weight)
    after = output()
    assert torch.equal(before.pred_logits, after.pred_logits) and torch.equal(before.pred_boxes, after.pred_boxes)
    assert before.group_logits.shape == (2 * 2, 2, 7, 2) and before.group_boxes.shape == (2 * 2, 2, 7, 4)
    assert not torch.equal(before.group_logits, after.group_logits)


def test_groups_do_not_see_each_other_nor_the_first(batch):
    detector = model(query_groups=3, num_denoising=0).train()
    with torch.no_grad():  # all groups alike
        detector.group_queries.weight.copy_(detector.query_selection.content_queries.weight.repeat(2, 1))
    output = detector(batch)
    by_layer = output.group_logits.unflatten(0, (2, 2))  # (layers, groups, ...)
    for group in by_layer.unbind(1):
        torch.testing.assert_close(group, output.pred_logits)
    torch.testing.assert_close(output.group_boxes.unflatten(0, (2, 2))[:, 1], output.pred_boxes)


def test_groups_that_are_alike_weigh_as_much_as_the_first(batch):
    output = model(num_denoising=0).train()(batch)
    logits, boxes = (value.repeat_interleave(3, dim=0) for value in (output.pred_logits, output.pred_boxes))
    alone = Criterion()(output, batch.targets)
    grouped = Criterion()(dataclasses.replace(output, group_logits=logits, group_boxes=boxes), batch.targets)
    proposals = sum(alone[f"{name}_encoder"] * weight for name, weight in Criterion().weights.items())
    torch.testing.assert_close(grouped["loss"], 2 * alone["loss"] - proposals)
    torch.testing.assert_close(grouped["loss_giou_groups"], alone["loss_giou_0"] + alone["loss_giou"])


def test_every_parameter_learns(batch):
    detector = model(query_groups=2, trainable_backbone_layers=5, backbone_norm="group").train()
    Criterion()(detector(batch), batch.targets)["loss"].backward()
    assert [name for name, parameter in detector.named_parameters() if parameter.grad is None] == []


def test_inference_has_the_first_group_alone(batch):
    grouped, single = model(query_groups=4).eval(), model().eval()
    single.load_state_dict({k: v for k, v in grouped.state_dict().items() if not k.startswith("group_queries")})
    one, other = grouped(batch), single(batch)
    assert torch.equal(one.pred_logits, other.pred_logits)
    assert one.group_logits is None


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (2, 3)])
def test_weights_of_another_number_of_groups_load(tmp_path, before, after):
    source, target = model(query_groups=before), model(query_groups=after)
    torch.nn.init.normal_(source.query_selection.content_queries.weight)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth")
    assert torch.equal(target.query_selection.content_queries.weight, source.query_selection.content_queries.weight)


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="query_groups must be at least 1"):
        model(query_groups=0)
