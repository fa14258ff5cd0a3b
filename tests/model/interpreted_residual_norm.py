"""The kernels of residual norms in Triton's interpreter, on CPU tensors.

TRITON_INTERPRET=1 must be set before Triton is imported, so `test_residual_norm.py` runs this file in a process of its
own; by hand: `TRITON_INTERPRET=1 python -m pytest -n 0 tests/model/interpreted_residual_norm.py`.
"""

import os

import pytest
import torch
from torch import nn

from dino_lightning.model import DINO, residual_norm
from dino_lightning.model.residual_norm import Call, Normed, _tried, set_implementation
from tests.conftest import TINY_SIZES
from tests.model.test_dino import random_batch
from tests.model.test_residual_norm import example, outcome, problem

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 first"

# Largest relative error of one rounding. The interpreter cuts bfloat16 off, which a device rounds: twice the error.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}


@pytest.fixture(autouse=True)
def in_triton():
    set_implementation("triton")
    yield
    set_implementation("auto")


@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "shared"), [((2, 5, 16), True), ((2, 9, 24), False), ((3, 1, 256), True), ((1, 3, 300), False)], ids=str
)
def test_against_float64(shape, shared, low):
    """Output, copies and all gradients, each within the rounding of its dtype."""
    inputs, grads = problem(shape, shared=shared, low=low)
    actuals = outcome(example, inputs, grads, low)
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expecteds = outcome(exactly, double, [grad.double() for grad in grads], None)
    for name, actual in actuals.items():
        wanted = inputs[name].dtype if name in inputs else (torch.float32 if name == "exact" else low or torch.float32)
        assert actual.dtype == wanted, name
        target = expecteds[name].detach()
        atol = 2e-5 * max(1.0, float(target.abs().max()))
        torch.testing.assert_close(
            actual.double(), target, rtol=ROUNDING[wanted], atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def exactly(x, branch, weight, bias, position):
    total = x + branch
    centred = total - total.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    return Normed(out, out, out + position)


@pytest.mark.parametrize("copies", [True, False])
def test_what_nobody_reads_gets_no_gradient_and_costs_nothing(copies):
    inputs, _ = problem((2, 3, 16), shared=True, low=torch.bfloat16)
    x, branch, weight, bias, position = inputs.values()
    norm = nn.LayerNorm(16)
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    with torch.autocast("cpu", torch.bfloat16):
        normed = residual_norm.residual_norm(x, branch, norm, position=position, copies=copies)
    assert (normed.lowered is not None, normed.positioned is not None) == (copies, copies)
    normed.exact.square().sum().backward()
    assert position.grad is None
    ours = [x.grad, branch.grad]
    x.grad = branch.grad = None
    norm(x + branch).square().sum().backward()
    for one, other in zip(ours, (x.grad, branch.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=2.0**-7, atol=1e-5)


@pytest.mark.parametrize("low", [None, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 2])
def test_a_level_embedding_has_the_gradient_that_it_has_by_the_position(images, low):
    sizes, draws = (6, 2, 1), torch.Generator().manual_seed(3)
    embedding = torch.randn(3, 16, generator=draws, requires_grad=True)
    places = torch.randn(images, 9, 16, generator=draws)
    inputs, grads = problem((2, 9, 16), shared=True, low=low)
    x, branch, weight, bias, _ = inputs.values()
    norm = nn.LayerNorm(16)
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    found = []
    for given in ({}, {"level_embedding": embedding, "level_sizes": sizes}):
        position = places + embedding.repeat_interleave(torch.tensor(sizes), dim=0)
        with torch.autocast("cpu", low, enabled=low is not None):
            normed = residual_norm.residual_norm(x, branch, norm, position=position, **given)
        found.append(torch.autograd.grad(normed.at(position), [x, branch, embedding], grads[1]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_more_rows_than_programs(monkeypatch):
    """Each program takes several blocks of rows."""
    monkeypatch.setattr(residual_norm, "MOST_PROGRAMS", 2)
    test_against_float64((2, 200, 64), True, torch.bfloat16)


def test_no_rows():
    inputs, grads = problem((0, 3, 16), shared=False, low=torch.bfloat16)
    found = outcome(example, inputs, grads, torch.bfloat16)
    assert found["exact"].shape == (0, 3, 16) and not found["weight"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_passes_and_notices_an_error(dtype):
    call = Call("cpu", 0, dtype, torch.float32, dtype, 16)
    assert _tried(call) is None
    right = residual_norm._backward
    wrong = torch.library.Library("dino_lightning", "IMPL", "CPU")
    wrong.impl("residual_norm_backward", lambda *args: (right(*args)[0] * 1.1, *right(*args)[1:]))
    try:
        assert "its gradient of the residual is off by 10" in _tried(call)
    finally:
        wrong._destroy()


@pytest.mark.parametrize("kind", [{}, {"recompute_encoder": True, "dropout": 0.1, "num_encoder_layers": 2}], ids=str)
def test_the_whole_detector_learns_the_same(kind):
    """Loss and gradients with kernels and without."""
    batch = random_batch([(64, 64), (48, 64)], [2, 1])
    found = []
    for implementation in ("triton", "pytorch"):
        set_implementation(implementation)
        torch.manual_seed(0)
        model = DINO(num_classes=3, **{**TINY_SIZES, **kind}).train()
        torch.manual_seed(1)
        output = model(batch)
        loss = output.pred_logits.square().mean() + output.pred_boxes.mean() + output.encoder_logits.square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append([loss.detach(), *(grad for grad in gradients if grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, float(other.abs().max())))
