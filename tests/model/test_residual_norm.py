"""The end of a sublayer: the kernel where it runs, plain PyTorch elsewhere, the same numbers from both."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dino_lightning import kernel_trial
from dino_lightning.model import residual_norm
from dino_lightning.model.encoder import EncoderLayer
from dino_lightning.model.residual_norm import Normed, implementation_in_use, set_implementation
from tests.interpreter import PROJECT, run_interpreted

CALL = residual_norm.Call("cuda", 0, torch.bfloat16, torch.float32, torch.bfloat16, 256)


def problem(shape, *, shared, low, device="cpu"):
    """Inputs by name, the position one for all images if `shared`, and gradients of output and copies."""
    draws = torch.Generator().manual_seed(7)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=draws).to(device, dtype)

    inputs = {
        "x": normal(*shape) * 2 + 0.5,
        "branch": normal(*shape, dtype=low or torch.float32),
        "weight": normal(shape[-1]),
        "bias": normal(shape[-1]),
        "position": normal(1 if shared else shape[0], *shape[1:]),
    }
    grads = [normal(*shape), *(normal(*shape, dtype=low or torch.float32) for _ in range(2))]
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}, grads


def example(x, branch, weight, bias, position):
    norm = nn.LayerNorm(x.shape[-1])
    norm._parameters.update(weight=weight, bias=bias)  # as they are, so that they get the gradients
    normed = residual_norm.residual_norm(x, branch, norm, position=position)
    return Normed(normed.exact, normed.for_products(), normed.at(position))


def outcome(compute, inputs, grads, low, device="cpu"):
    """Output, copies and the gradients of all inputs, by name."""
    with torch.autocast(device, low, enabled=low is not None):
        outs = compute(*inputs.values())
    gradients = torch.autograd.grad(outs, list(inputs.values()), grads)
    return {**outs._asdict(), **dict(zip(inputs, gradients, strict=True))}


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    run_interpreted(Path(__file__).with_name("interpreted_residual_norm.py"))


def test_a_cpu_needs_no_triton():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from dino_lightning.model.encoder import Encoder\n"
        "from dino_lightning.model.residual_norm import residual_norm, set_implementation\n"
        "x, norm = torch.randn(1, 2, 4), torch.nn.LayerNorm(4)\n"
        "assert torch.equal(residual_norm(x, x, norm).exact, norm(x + x))\n"
        "set_implementation('triton')\n"
        "residual_norm(x, x, norm)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT)
    assert "RuntimeError: Residual norms cannot run in Triton: it needs a CUDA device" in done.stderr


@pytest.fixture
def device_like(monkeypatch):
    """Calls are taken for those of a device whose trial passes; what the kernel would get is kept."""
    taken = []
    monkeypatch.setattr(residual_norm, "_trouble_with", lambda call: taken.append(call))
    monkeypatch.setattr(residual_norm, "_implementation", "triton")
    return taken


class Other(nn.LayerNorm):
    """What an adapter has put in place of a norm."""


def test_norms_that_were_replaced_or_are_watched_and_tokens_that_are_not_float32_are_left_to_pytorch(device_like):
    x, norm, position = torch.randn(2, 3, 8), nn.LayerNorm(8), torch.randn(1, 3, 8)
    assert residual_norm._takes_kernel(x, x, norm, position)
    assert device_like == [residual_norm.Call("cpu", 0, *[torch.float32] * 3, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        assert residual_norm._takes_kernel(x, x.bfloat16(), norm, None)
    assert device_like[1][2:] == (torch.bfloat16, torch.float32, torch.bfloat16, 8)
    watched = nn.LayerNorm(8)
    watched.register_forward_hook(lambda *_: None)
    without = nn.LayerNorm(8, elementwise_affine=False)
    for other in (Other(8), watched, without, nn.LayerNorm(8).bfloat16(), nn.LayerNorm((3, 8)), nn.Identity()):
        assert not residual_norm._takes_kernel(x, x, other, position)
    assert not residual_norm._takes_kernel(x.bfloat16(), x.bfloat16(), norm, position)
    assert not residual_norm._takes_kernel(x, x[:1], norm, position)


@pytest.fixture
def untried():
    residual_norm._trouble_with.cache_clear()
    yield
    residual_norm._trouble_with.cache_clear()


def test_a_failed_trial_costs_a_warning_and_pytorch_says_so(monkeypatch, untried):
    monkeypatch.setattr(kernel_trial, "missing", lambda *_: None)
    monkeypatch.setattr(kernel_trial, "allowed_to_wait", lambda index, trial: trial())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a device")
    monkeypatch.setattr(residual_norm, "_tried", lambda call: "its sum is off by 7.0% of the largest")
    monkeypatch.setattr(residual_norm, "_found", {})
    device = torch.device("cuda", 0)
    assert implementation_in_use(device) == "not known yet"
    with pytest.warns(UserWarning, match=r"failed its trial on a device \(its sum is off by 7.0%") as warned:
        assert residual_norm._trouble_with(CALL)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert residual_norm._trouble_with(CALL)
    assert implementation_in_use(device) == "PyTorch (its sum is off by 7.0% of the largest)"
    assert "longer than 4096" in residual_norm._trouble_with(CALL._replace(dim=4097))
    assert "no kernel for torch.float64" in residual_norm._trouble_with(CALL._replace(branch_dtype=torch.float64))
    monkeypatch.setattr(residual_norm, "_found", {CALL: None})
    assert implementation_in_use(device) == "Triton kernel"
    torch.use_deterministic_algorithms(True)
    try:
        assert implementation_in_use(device) == "PyTorch (deterministic algorithms were asked for)"
    finally:
        torch.use_deterministic_algorithms(False)
    assert implementation_in_use(torch.device("cpu")) == "PyTorch"
    with pytest.raises(ValueError, match="'cuda' is none of auto, pytorch, triton"):
        set_implementation("cuda")


def test_a_compiled_layer_is_plain_pytorch(device_like):
    torch.manual_seed(0)
    layer = EncoderLayer(hidden_dim=16, num_levels=1, num_heads=2, num_points=2, ffn_dim=8, dropout=0.0)
    inputs = (Normed(torch.randn(1, 6, 16)), torch.randn(1, 6, 16), torch.rand(1, 6, 1, 2), ((2, 3),), None)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs, copies=True)
    assert not device_like and out.lowered is out.positioned is None
    set_implementation("pytorch")
    torch.testing.assert_close(out.exact, layer(*inputs).exact)


@pytest.mark.gpu
@pytest.mark.parametrize("low", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared", [True, False])
def test_against_float64_on_a_device(low, shared):
    inputs, grads = problem((2, 5000, 256), shared=shared, low=low, device="cuda")
    actuals = outcome(example, inputs, grads, low, "cuda")
    assert implementation_in_use(torch.device("cuda")) == "Triton kernel"
    double = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    expecteds = outcome(example, double, [grad.double() for grad in grads], None, "cuda")
    for name, actual in actuals.items():
        target = expecteds[name].detach()
        rounding = torch.finfo(actual.dtype).eps / 2
        torch.testing.assert_close(actual.double(), target, rtol=rounding, atol=1e-5 * float(target.abs().max()))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_a_device_never_waits():
    inputs, grads = problem((2, 500, 256), shared=True, low=torch.bfloat16, device="cuda")
    outcome(example, inputs, grads, torch.bfloat16, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcome(example, inputs, grads, torch.bfloat16, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
