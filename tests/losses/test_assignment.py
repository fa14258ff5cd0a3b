"""Which solver of assignments runs, and what happens where the device's cannot."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dino_lightning import DINOModule
from dino_lightning.errors import NonFiniteError, UsageError
from dino_lightning.losses import Criterion, HungarianMatcher, assignment, criterion, matcher
from dino_lightning.structures import DenoisingOutput, ModelOutput
from tests.conftest import TINY_SIZES
from tests.interpreter import run_interpreted
from tests.losses.test_matching_and_losses import random_problem

PROJECT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_kernel_in_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_assignment.py"))


def test_a_cpu_needs_no_triton():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from dino_lightning.losses import HungarianMatcher, assignment\n"
        "from dino_lightning.structures import pad_targets\n"
        "targets = pad_targets([(torch.full((1, 4), 0.5), torch.tensor([0]))])\n"
        "problem = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3, 4), 0.4), targets\n"
        "print(HungarianMatcher(solver='auto')(*problem).matched.tolist())\n"
        "print([name for name in sys.modules if name.endswith('assignment_kernel')])\n"
        "torch.version.cuda, torch.cuda.get_device_capability = '12', lambda index: (8, 6)\n"
        "print(assignment._trouble(assignment.Blocks('cuda', 0, 16, 1024, False)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.splitlines() == ["[[[True]]]", "[]", "triton is not installed"]


def test_scipy_unless_another_is_chosen():
    assert HungarianMatcher().solver == "scipy"
    module = DINOModule(num_classes=3, backbone_weights=None, matching_solver="auto", **TINY_SIZES)
    assert module.criterion.matcher.solver == "auto"
    with pytest.raises(ValueError, match="choose one of scipy, device, auto"):
        HungarianMatcher(solver="gpu")


def test_the_device_of_a_cpu_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assignment._trouble.cache_clear()
    with pytest.raises(
        UsageError, match=r"it needs a CUDA device, or on a CPU TRITON_INTERPRET.*matching_solver scipy or auto"
    ):
        HungarianMatcher(solver="device")(*random_problem([2, 1], 5))


def test_problems_that_are_too_large_for_registers(monkeypatch):
    monkeypatch.setattr(assignment.kernel_trial, "missing", lambda *device: None)
    for blocks in (assignment.Blocks("cuda", 0, 2048, 2048, False), assignment.Blocks("cuda", 0, 16, 4096, True)):
        assert "at most 1024 x 2047" in assignment._trouble.__wrapped__(blocks)


@pytest.fixture
def pretended_device(monkeypatch):
    """A CUDA device whose kernel has yet to be tried, as far as the choice of a solver is concerned."""
    blocks, tried = assignment._blocks, assignment._tried
    monkeypatch.setattr(assignment, "_tried", lambda blocks: tried(blocks._replace(device_type="cpu")))
    monkeypatch.setattr(assignment, "_blocks", lambda *problem: blocks(*problem)._replace(device_type="cuda"))
    monkeypatch.setattr(assignment.kernel_trial, "missing", lambda *device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a device")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    for cached in (assignment._trouble, assignment._warn_once):
        cached.cache_clear()
    yield
    for cached in (assignment._trouble, assignment._warn_once):
        cached.cache_clear()


def broken_compiler(cost, num_boxes):
    raise OSError("no C compiler")


def first_come(cost, num_boxes):
    """One to one, but not the least cost: box i takes query i. What is not finite is seen."""
    found = torch.full(cost.shape[:3], -1)
    for image, count in enumerate(num_boxes):
        least = min(count, cost.shape[3])
        found[:, image, :least] = torch.arange(least)
    bad = torch.stack([~cost[:, image, :count].isfinite().flatten(1).all(1) for image, count in enumerate(num_boxes)])
    return found, bad.T.int().contiguous()


def by_scipy(cost, num_boxes):
    found, bad = first_come(cost, num_boxes)
    for layer, image in np.ndindex(*bad.shape):
        if not bad[layer, image]:
            boxes, queries = linear_sum_assignment(cost[layer, image, : num_boxes[image]].numpy())
            found[layer, image] = -1
            found[layer, image, boxes] = torch.from_numpy(queries)
    return found, bad


@pytest.mark.parametrize(
    ("solve", "reason"), [(broken_compiler, "OSError: no C compiler"), (first_come, r"a total cost is .* is the least")]
)
def test_a_kernel_that_fails_its_trial_is_left_out_with_one_warning(monkeypatch, pretended_device, solve, reason):
    monkeypatch.setattr(assignment, "solve_on_device", solve)
    problem = random_problem([3, 0, 1], 5)
    expected = HungarianMatcher()(*problem)
    with pytest.warns(UserWarning, match=rf"solved by scipy.*failed its trial on a device \({reason}"):
        actual = HungarianMatcher(solver="auto")(*problem)
    assert torch.equal(actual.queries, expected.queries) and torch.equal(actual.matched, expected.matched)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HungarianMatcher(solver="auto")(*problem)
    with pytest.raises(UsageError, match=f"failed its trial on a device.*{reason}"):
        HungarianMatcher(solver="device")(*problem)


def test_a_kernel_that_passes_its_trial_is_taken(monkeypatch, pretended_device):
    seen = []

    def solve(cost, num_boxes):
        seen.append(tuple(cost.shape))
        return by_scipy(cost, num_boxes)

    for module in (assignment, matcher):
        monkeypatch.setattr(module, "solve_on_device", solve)
    problem = random_problem([3, 0, 1], 5)
    for _ in range(2):
        actual = HungarianMatcher(solver="auto")(*problem)
    assert torch.equal(actual.queries, HungarianMatcher()(*problem).queries)
    assert seen == [(2, 4, 7, 7), (3, 3, 3, 5), (3, 3, 3, 5)]  # one trial


def test_the_verdict_sees_every_fault():
    cost = np.random.default_rng(0).normal(size=(1, 3, 4, 6)).astype(np.float32)
    cost[0, 2, 0, 0] = np.nan
    counts = (4, 2, 4)
    found, bad = (tensor.numpy() for tensor in by_scipy(torch.from_numpy(cost), counts))
    assert assignment.verdict(cost, counts, found, bad) is None
    faults = {
        "not tell costs that are finite": (found, 1 - bad),
        "not one to one": (np.where(np.arange(4) == 1, found[..., :1], found), bad),
        "queries that there are not": (np.where(np.arange(4) == 1, 6, found), bad),
        "is the least": (
            np.where(np.arange(4) < np.array(counts)[:, None], np.arange(4), -1)[None],
            bad,
        ),
    }
    for words, (wrong, marks) in faults.items():
        assert words in (assignment.verdict(cost, counts, wrong, marks) or ""), words
    padded = found.copy()
    padded[0, 1, 3] = next(query for query in range(6) if query not in found[0, 1])
    assert "one to one" in assignment.verdict(cost, counts, padded, bad)


def test_what_can_be_launched_is_launched_before_anything_waits(monkeypatch):
    """Scipy's costs travel during the losses of the denoising queries, which need no matching; where the device solves,
    the criterion asks whether costs were finite when all its terms are there; `forward` of a matcher asks at once.
    """
    order = []

    def later(marks):
        def wait():
            order.append("wait")
            return marks.numpy()

        return wait

    class OwnMatcher(HungarianMatcher):
        def forward(self, *given):
            order.append("own")
            return super().forward(*given)

    launched = criterion._denoising_losses, criterion._matched_losses

    def noted(function):
        def call(*given):
            order.append(function.__name__)
            return function(*given)

        return call

    monkeypatch.setattr(matcher, "takes_device", lambda solver, *problem: solver == "device")
    monkeypatch.setattr(matcher, "solve_on_device", by_scipy)
    monkeypatch.setattr(matcher, "to_host_later", later)
    for function in launched:
        monkeypatch.setattr(criterion, function.__name__, noted(function))
    logits, boxes, targets = random_problem([2, 1], 5)
    rebuilt = DenoisingOutput(pred_logits=logits[:2, :, :4], pred_boxes=boxes[:2, :, :4], num_groups=1, max_boxes=2)
    output = ModelOutput(
        pred_logits=logits[:2],
        pred_boxes=boxes[:2],
        encoder_logits=logits[2],
        encoder_boxes=boxes[2],
        denoising=rebuilt,
    )
    expected = Criterion()(output, targets)
    assert order == ["_denoising_losses", "wait", "_matched_losses"]
    order.clear()
    assert Criterion(matcher=OwnMatcher())(output, targets) == expected  # it starts only when it is asked
    assert order == ["_denoising_losses", "own", "wait", "_matched_losses"]
    order.clear()
    Criterion(matcher=HungarianMatcher(solver="device"))(output, targets)
    assert order == ["_denoising_losses", "_matched_losses", "wait"]
    order.clear()
    logits[0, 1, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"\[8\]"):
        Criterion(matcher=HungarianMatcher(solver="device"))(output, targets, (7, 8))
    with pytest.raises(NonFiniteError, match=r"\[8\]"):
        HungarianMatcher(solver="device")(logits, boxes, targets, (7, 8))
    assert order == ["_denoising_losses", "_matched_losses", "wait", "wait"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("excess", [False, True])
def test_the_kernel_compiles_for_devices_that_are_not_here(capability, excess):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dino_lightning.losses.assignment_kernel import NUM_WARPS, _assign

    constants = {"ROWS": 128, "COLUMNS": 1024, "EXCESS": excess}
    types = {"cost": "*fp32", "counts": "*i32", "assigned": "*i64", "strange": "*i32"}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in _assign.arg_names}
    takes = "constexprs" if "constexprs" in inspect.signature(ASTSource).parameters else "constants"  # Triton 3.2
    source = ASTSource(fn=_assign, signature=signature, **{takes: constants})
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": NUM_WARPS})
    assert f"sm_{capability}" in built.asm["ptx"] and len(built.asm["cubin"]) > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "queries"),
    [((10, 3), 900), ((100, 96, 0, 50), 900), ((300,), 900), ((1, 16, 17), 300), ((40, 5), 33), ((950, 2), 900)],
)
def test_on_a_device(counts, queries):
    assignment._trouble.cache_clear()
    logits, boxes, targets = random_problem(counts, queries, layers=7, classes=80)
    on_device = logits.cuda(), boxes.cuda(), targets.to("cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HungarianMatcher(solver="auto")(*on_device)
    assert assignment.takes_device("auto", HungarianMatcher().cost(*on_device), counts)
    cost = HungarianMatcher().cost(*on_device)
    found, strange = (tensor.cpu().numpy() for tensor in assignment.solve_on_device(cost, counts))
    assert assignment.verdict(cost.cpu().numpy(), counts, found, strange) is None
    on_device[1][3, 0, 7] = torch.nan
    with pytest.raises(NonFiniteError, match=r"\[44\]"):
        HungarianMatcher(solver="device")(*on_device, image_ids=range(44, 44 + len(counts)))
