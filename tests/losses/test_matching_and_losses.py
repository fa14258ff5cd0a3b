"""Properties of matching and losses that no golden number shows."""

from typing import get_args

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from dino_lightning.boxes import cxcywh_to_xyxy, paired_generalized_iou
from dino_lightning.errors import NonFiniteError
from dino_lightning.losses import Criterion, HungarianMatcher
from dino_lightning.losses.matcher import MatchingCost
from dino_lightning.model import DINO
from dino_lightning.structures import ModelOutput, pad_targets
from tests.conftest import TINY_SIZES
from tests.model.test_dino import random_batch


def random_problem(counts, queries, layers=3, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(counts), queries, classes, generator=generator)
    boxes = torch.rand(layers, len(counts), queries, 4, generator=generator) * 0.5 + 0.1
    targets = [
        (
            torch.rand(n, 4, generator=generator) * 0.5 + 0.1,
            torch.randint(0, classes, (n,), generator=generator),
        )
        for n in counts
    ]
    return logits, boxes, pad_targets(targets)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 8), st.integers(0, 10))
def test_matching_is_the_best_one_to_one_assignment(counts, queries, seed):
    logits, boxes, targets = random_problem(counts, queries, seed=seed)
    matcher = HungarianMatcher()
    matches = matcher(logits, boxes, targets)
    assert matches.queries.shape == (3, len(counts), max(counts))
    for layer in range(3):
        for image, count in enumerate(counts):
            matched = matches.matched[layer, image]
            assert matched.sum() == min(count, queries)
            assert not matched[count:].any()
            chosen = matches.queries[layer, image, matched]
            assert len(set(chosen.tolist())) == len(chosen)
            if count:
                cost = matcher.cost(logits, boxes, targets)[layer, image, :count]
                rows, columns = linear_sum_assignment(cost.numpy())
                ours = cost[matched[:count].nonzero().flatten(), chosen].sum()
                assert ours.item() == pytest.approx(cost[rows, columns].sum().item(), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10))
def test_the_position_modulated_cost_is_the_published_one_of_probabilities_that_follow_the_overlap(
    count, queries, seed
):
    logits, boxes, targets = random_problem([count], queries, layers=2, classes=3, seed=seed)
    cost = HungarianMatcher(kind="position_modulated").cost(logits, boxes, targets)
    for layer in range(2):
        for box in range(count):
            corners = [cxcywh_to_xyxy(values) for values in (boxes[layer, 0], targets.boxes_cxcywh[0, box])]
            fit = ((paired_generalized_iou(*corners) + 1) / 2).sqrt()
            modulated = torch.logit(logits[layer, 0].sigmoid() * fit[:, None])
            one = pad_targets([(targets.boxes_cxcywh[0, box : box + 1], targets.labels[0, box : box + 1])])
            expected = HungarianMatcher().cost(modulated[None, None], boxes[layer : layer + 1], one)
            torch.testing.assert_close(cost[layer, 0, box], expected[0, 0, 0], rtol=1e-4, atol=1e-4)


def test_the_position_modulated_cost_prefers_the_better_box_to_the_better_score():
    """One query with the better score, one with the better box: the published cost takes the first."""
    logits = torch.tensor([2.0, -0.5]).view(1, 1, 2, 1)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.2]]).view(1, 1, 2, 4)
    targets = pad_targets([(torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([0]))])
    chosen = [HungarianMatcher(kind=kind)(logits, boxes, targets).queries.item() for kind in get_args(MatchingCost)]
    assert chosen == [0, 1]
    with pytest.raises(ValueError, match="choose one of published, position_modulated"):
        HungarianMatcher(kind="other")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=3), st.integers(0, 10))
def test_padding_of_targets_changes_no_loss(counts, seed):
    """An image judged in a batch and alone gives the same terms, but for the common divisor."""
    logits, boxes, targets = random_problem(counts, 7, seed=seed)
    criterion = Criterion()

    def judge(images):
        part = pad_targets([(targets.boxes_cxcywh[i, : counts[i]], targets.labels[i, : counts[i]]) for i in images])
        output = ModelOutput(
            pred_logits=logits[:2, images],
            pred_boxes=boxes[:2, images],
            encoder_logits=logits[2, images],
            encoder_boxes=boxes[2, images],
        )
        return criterion(output, part)["loss"].item() * max(sum(counts[i] for i in images), 1)

    together = judge(list(range(len(counts))))
    alone = sum(judge([i]) for i in range(len(counts)))
    assert together == pytest.approx(alone, rel=1e-4)


def test_a_cost_that_is_no_number_names_the_images():
    logits, boxes, targets = random_problem([2, 1, 3], 5)
    logits[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"\[77\]") as caught:
        HungarianMatcher()(logits, boxes, targets, image_ids=(5, 6, 77))
    assert caught.value.image_ids == [77]


class HostReads(TorchDispatchMode):
    """Counts operations that make the host wait for a value or a shape from the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(part in str(function) for part in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_no_value_is_read_back_between_batch_and_gradients():
    """Besides the matcher's one copy (a no-op on the CPU) nothing waits for the device."""
    model = DINO(num_classes=3, **TINY_SIZES).train()
    criterion = Criterion()
    batch = random_batch([(64, 96), (80, 48)], [2, 1])
    with HostReads() as reads:
        criterion(model(batch), batch.targets, batch.image_ids)["loss"].backward()
    assert reads.names == []
    with HostReads() as reads:
        torch.ones(3).sum().item()
    assert reads.names  # the counter does count
