"""The kernel that solves assignments in Triton's interpreter, on CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, so `test_assignment.py` runs this file in a process of its
own; by hand: `TRITON_INTERPRET=1 python -m pytest -n 0 tests/losses/interpreted_assignment.py`.
"""

import os

import hypothesis.strategies as st
import lightning
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.errors import NonFiniteError
from dino_lightning.losses import Criterion, HungarianMatcher
from dino_lightning.losses.assignment import Blocks, _tried, solve_on_device
from dino_lightning.structures import ModelOutput
from tests.conftest import TINY_SIZES
from tests.losses.test_matching_and_losses import random_problem

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 first"


def check_against_scipy(cost, counts):
    """Every box or every query is used, none twice, at scipy's total cost."""
    found, strange = solve_on_device(cost, counts)
    assert found.shape == cost.shape[:3] and not strange.any()
    for layer, of_layer in enumerate(found):
        for image, count in enumerate(counts):
            problem, query_of = cost[layer, image, :count].double(), of_layer[image]
            boxes = (query_of >= 0).nonzero().flatten()
            queries = query_of[boxes]
            assert not (query_of[count:] >= 0).any()
            assert len(boxes) == min(problem.shape) == len(set(queries.tolist()))
            least = problem[linear_sum_assignment(problem.numpy())].sum()
            assert problem[boxes, queries].sum().item() == pytest.approx(least.item(), rel=1e-5, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=3), st.integers(1, 12), st.integers(0, 1000), st.booleans())
def test_total_costs_are_those_of_scipy(counts, queries, seed, whole):
    """With more boxes than queries, fewer, as many and none; whole numbers have many assignments of the same cost."""
    boxes = max(*counts, 1)
    cost = torch.randn((2, len(counts), boxes, queries), generator=torch.Generator().manual_seed(seed)) * 5
    check_against_scipy(cost.round() if whole else cost, tuple(counts))


@pytest.mark.parametrize(
    ("counts", "queries"),
    [((31, 40, 7), 40), ((40,), 33), ((17,), 200), ((3, 50), 12), ((1,), 1), ((16,), 15), ((15,), 31), ((32,), 32)],
)
def test_larger_problems(counts, queries):
    """Some fill the blocks of rows and columns, some need a column more."""
    cost = torch.randn((1, len(counts), max(counts), queries), generator=torch.Generator().manual_seed(1)) * 5
    check_against_scipy(cost, counts)


def test_one_query_that_all_boxes_want():
    """Long paths: every box moves those before it on."""
    count = 12
    cost = torch.arange(count * 1.0)[None, :] * torch.arange(1.0, count + 1)[:, None]
    check_against_scipy(cost[None, None], (count,))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 8), st.integers(0, 10))
def test_a_matcher_assigns_as_with_scipy(counts, queries, seed):
    problem = random_problem(counts, queries, seed=seed)
    expected, actual = (HungarianMatcher(solver=solver)(*problem) for solver in ("scipy", "device"))
    assert torch.equal(actual.queries, expected.queries)  # without ties, and these are random
    assert torch.equal(actual.matched, expected.matched)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("counts", [(2, 1, 3), (2, 1, 7)], ids=["fewer", "excess"])
def test_costs_that_are_not_finite_name_the_images(bad, counts):
    logits, boxes, targets = random_problem(counts, 5)
    boxes[1, 2, 3, 0] = bad
    matcher = HungarianMatcher(solver="device")
    with pytest.raises(NonFiniteError, match=r"\[77\]"):
        matcher(logits, boxes, targets, image_ids=(5, 6, 77))
    with pytest.raises(NonFiniteError, match=r"\[2\]"):
        matcher.begin(logits, boxes, targets).check()


def test_padding_may_hold_anything():
    cost = torch.randn((1, 2, 4, 6), generator=torch.Generator().manual_seed(2))
    cost[0, 1, 2:] = torch.nan
    check_against_scipy(cost, (4, 2))


@pytest.mark.parametrize("boxes", [0, 4])
def test_every_place_that_is_not_finite_is_seen(boxes):
    counts = (3 + boxes,)
    for box in range(3 + boxes):
        for query in range(4):
            cost = torch.zeros((1, 1, 3 + boxes, 4))
            cost[0, 0, box, query] = torch.nan
            assert solve_on_device(cost, counts)[1].item() == 1


def test_the_criterion_raises_too_and_has_the_same_losses():
    logits, boxes, targets = random_problem([2, 0, 3], 7)
    output = ModelOutput(
        pred_logits=logits[:2].requires_grad_(),
        pred_boxes=boxes[:2],
        encoder_logits=logits[2],
        encoder_boxes=boxes[2],
    )
    expected, actual = (
        Criterion(matcher=HungarianMatcher(solver=solver))(output, targets) for solver in ("scipy", "device")
    )
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    output.pred_boxes[0, 2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"\[9\]"):
        Criterion(matcher=HungarianMatcher(solver="device"))(output, targets, (3, 4, 9))


def test_training_is_the_same(rooms, tmp_path):
    weights = []
    for solver in ("scipy", "device"):
        torch.manual_seed(0)
        data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)
        module = DINOModule(num_classes=data.num_classes, backbone_weights=None, matching_solver=solver, **TINY_SIZES)
        lightning.Trainer(
            accelerator="cpu",
            max_steps=2,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, data)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("excess", [False, True])
def test_the_trial_passes(excess):
    assert _tried(Blocks("cpu", 0, 16, 32, excess)) is None
