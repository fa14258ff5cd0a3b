"""Which implementation of deformable attention runs: decided here, and nowhere else.

| where | what runs with "auto" |
|---|---|
| CUDA device of capability 8.0 or newer | the Triton kernels, if they pass their trial |
| of those, 8.0 to 8.9, the backward pass | the CUDA kernel, if it passes its own, see `cuda_kernels.py` |
| a CUDA device that is older, in float16 | PyTorch in float16, some heads at a time, see `halves.py` |
| a CPU | PyTorch and SciPy, gathered, see `gathered.py` |
| any other device, compiled or exported code | plain PyTorch, level by level, see `reference.py` |
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dino_lightning import kernel_trial
from dino_lightning.model.deformable_attention import cuda_kernels, fused, limits, nvrtc
from dino_lightning.model.deformable_attention.gathered import can_gather, gathered, places_and_weights
from dino_lightning.model.deformable_attention.halves import halves_on, in_halves, takes_halves
from dino_lightning.model.deformable_attention.reference import deformable_attention

Implementation = Literal["auto", "pytorch", "triton", "cuda"]
TRIAL = "dino_lightning.model.deformable_attention.cuda_trial"  # of the CUDA kernel, in a process of its own
_implementation: Implementation = "auto"


def set_implementation(implementation: Implementation) -> None:
    """Choose how deformable attention is computed, in this process, from now on.

    Args:
        implementation: "auto" takes the kernels where they run and are the fastest, and PyTorch elsewhere; "pytorch"
            never takes a kernel, and computes in float32; "triton" always takes Triton's, on CPU tensors too if Triton
            interprets (TRITON_INTERPRET=1 before the start); "cuda" always takes Triton's and for the backward pass the
            CUDA one.

    Raises:
        ValueError: there is no such implementation.
    """
    global _implementation
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r} is none of {', '.join(get_args(Implementation))}.")
    _implementation = implementation


class Call(NamedTuple):
    """What a kernel is compiled for; a trial speaks for all calls that are alike in this."""

    device_type: str
    device_index: int
    value_dtype: torch.dtype
    offsets_dtype: torch.dtype
    logits_dtype: torch.dtype
    heads: int
    dim: int
    levels: int
    points: int
    coordinates: int


_found: dict[Call, str | None] = {}  # what `_trouble_with` has found
_found_of_cuda: dict[Call, str | None] = {}  # what `_cuda_trouble_with` has found


def implementation_in_use(device: torch.device) -> str:
    """Which implementation has computed deformable attention on a device in this process, and why where it fell back.

    Args:
        device: of the model.

    Returns:
        On one line, such as "Triton kernel", "Triton kernel, CUDA kernel backward", "PyTorch", or "PyTorch in float16
        (the device is older than compute capability 8.0)"; of a CUDA device "not known yet" before the first forward
        pass.
    """
    place = (device.type, device.index or 0)
    fell_back = [call.value_dtype for call, trouble in _found.items() if trouble is not None and call[:2] == place]
    plain = "PyTorch in float16" if any(halves_on(device, dtype) for dtype in fell_back) else "PyTorch"
    kernel = "Triton kernel" if _implementation == "triton" else f"Triton kernel{_said_of_cuda(device)}"
    return kernel_trial.in_use(_implementation, device, _found, kernel=kernel, plain=plain)


def _said_of_cuda(device: torch.device) -> str:
    """What follows "Triton kernel", where the CUDA kernel has been tried for the backward pass; else nothing."""
    passed, reasons = kernel_trial.trials_on(device, _found_of_cuda)
    if passed:
        return f", CUDA kernel backward{f', for some calls Triton ({reasons})' if reasons else ''}"
    return f", backward as well ({reasons})" if reasons else ""


def sample(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Softmax over levels and points, places, samples, weighted sum; computed in float32, whatever the inputs are.

    Args:
        value: (B, S, H, D).
        spatial_shapes: (height, width) of each of the L levels, on the host.
        reference_points: (B, Q, L, 2) points or (B, Q, L, 4) boxes cxcywh, 0-1 of the padded map.
        sampling_offsets: (B, Q, H, L, P, 2), in cells for points, in half box sizes over P for boxes.
        attention_logits: (B, Q, H, L * P).

    Returns:
        (B, Q, H * D), of the dtype of `value`.

    Raises:
        RuntimeError: "triton" or "cuda" was asked for, and it cannot be had; says why.
    """
    if _takes_kernel(value, spatial_shapes, reference_points, sampling_offsets, attention_logits):
        call = _call_of(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
        return fused.deformable_attention(
            value.transpose(1, 2).contiguous(),
            reference_points.float(),
            sampling_offsets,
            attention_logits,
            [side for shape in spatial_shapes for side in shape],
            _takes_cuda(value.shape[0] * value.shape[2], call),
        )
    return _in_pytorch(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)


def _in_pytorch(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    if _implementation == "auto" and takes_halves(value):
        return in_halves(value, spatial_shapes, reference_points, sampling_offsets, attention_logits)
    gathers = not torch.compiler.is_compiling() and can_gather(value, sampling_offsets.shape[1])
    with torch.autocast(device_type=value.device.type, enabled=False):
        locations, weights = places_and_weights(reference_points, sampling_offsets, attention_logits, spatial_shapes)
        attend = gathered if gathers else deformable_attention
        return attend(value.float(), spatial_shapes, locations, weights).to(value.dtype)


def _takes_kernel(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> bool:
    if _implementation == "pytorch" or (_implementation == "auto" and value.device.type != "cuda"):
        return False
    if _implementation == "auto" and torch.are_deterministic_algorithms_enabled():
        return False  # the kernel's sums have no fixed order; PyTorch knows what to say about its own
    if any(side > limits.MAX_SIDE for shape in spatial_shapes for side in shape):
        trouble: str | None = f"a side of a map is longer than {limits.MAX_SIDE}"
    else:
        trouble = _trouble(*_call_of(value, spatial_shapes, reference_points, sampling_offsets, attention_logits))
    if trouble is not None and _implementation in ("triton", "cuda"):
        raise RuntimeError(f"Deformable attention cannot run in Triton: {trouble}.")
    return trouble is None


def _call_of(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> tuple[Any, ...]:
    """The parts of a `Call`; a plain tuple, which compiled code can make."""
    return (
        value.device.type,
        value.device.index or 0,
        value.dtype,
        sampling_offsets.dtype,
        attention_logits.dtype,
        value.shape[2],
        value.shape[3],
        len(spatial_shapes),
        sampling_offsets.shape[4],
        reference_points.shape[-1],
    )


def _takes_cuda(images_and_heads: int, call: tuple[Any, ...]) -> bool:
    """Whether the backward pass of such a call, which takes the kernel forward, is for the CUDA kernel."""
    if _implementation == "triton" or not torch.is_grad_enabled():
        return False  # inference need not wait for a kernel that it never runs
    if images_and_heads > cuda_kernels.MAX_IMAGES_AND_HEADS:
        return False
    if call[0] != "cuda" and _implementation == "cuda":
        raise RuntimeError("Deformable attention cannot run in CUDA: it needs a CUDA device.")
    if call[0] != "cuda" or (_implementation == "auto" and not _for_cuda(call[1])):
        return False
    trouble = _cuda_trouble(*call)
    if trouble is not None and _implementation == "cuda":
        raise RuntimeError(f"Deformable attention cannot run in CUDA: {trouble}.")
    return trouble is None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _for_cuda(device_index: int) -> bool:
    major, minor = torch.cuda.get_device_capability(device_index)
    return 10 * major + minor in cuda_kernels.CAPABILITIES


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _cuda_trouble(*call: Any) -> str | None:
    """Why the CUDA kernel cannot take such calls, or None if it can. Constant, as `_trouble`."""
    return _cuda_trouble_with(Call(*call))


@functools.cache
def _cuda_trouble_with(call: Call) -> str | None:
    trouble = cuda_kernels.missing(call.dim, call.levels * call.points)
    if trouble is None:
        trouble = kernel_trial.in_a_thread(lambda: _tried_apart(call) or _try(call, True))
        if trouble is not None and _implementation == "auto":
            warnings.warn(
                "The gradients of deformable attention are computed by Triton, which is slower, since the CUDA kernel "
                f"failed its trial on {torch.cuda.get_device_name(call.device_index)} ({trouble}).",
                stacklevel=2,
            )
    _found_of_cuda[call] = trouble
    return trouble


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch has no types here
def _trouble(*call: Any) -> str | None:
    """Why the kernel cannot take such calls, or None if it can. Constant, so that compiled code need not ask."""
    return _trouble_with(Call(*call))


@functools.cache
def _trouble_with(call: Call) -> str | None:
    trouble = _missing(call)
    if trouble is not None or call.device_type == "cpu":
        _found[call] = trouble
        return trouble
    _found[call] = trouble = kernel_trial.in_a_thread(lambda: _try(call))
    if trouble is not None and _implementation == "auto":
        warnings.warn(
            "Deformable attention runs in plain PyTorch, which is slower, since its Triton kernel failed its trial on "
            f"{torch.cuda.get_device_name(call.device_index)} ({trouble}).",
            stacklevel=2,
        )
    return trouble


def _missing(call: Call) -> str | None:
    """What can be known without running anything."""
    trouble = kernel_trial.missing(call.device_type, call.device_index)
    if trouble is not None:
        return trouble
    if call.dim not in limits.DIMS:
        return f"{call.dim} channels for each head are none of {', '.join(map(str, limits.DIMS))}"
    if call.levels > limits.MAX_LEVELS:
        return f"there are more than {limits.MAX_LEVELS} levels"
    dtypes = {call.value_dtype, call.offsets_dtype, call.logits_dtype}
    if not dtypes <= set(limits.DTYPES):
        return f"there is no kernel for {', '.join(sorted(map(str, dtypes - set(limits.DTYPES))))}"
    return None


def _try(call: Call, cuda_backward: bool = False) -> str | None:
    """Compile and run both directions on small examples, compare with plain PyTorch; waits for the device, once."""
    return kernel_trial.allowed_to_wait(call.device_index, lambda: _tried(call, cuda_backward))


def _tried_apart(call: Call) -> str | None:
    """What a process of its own says of the CUDA kernel, which has run on few kinds of devices so far."""
    named = json.dumps([one if isinstance(one, (int, str)) else str(one).removeprefix("torch.") for one in call])
    device = f"{torch.cuda.get_device_name(call.device_index)}, torch {torch.__version__}"
    key = hashlib.sha256("\0".join([cuda_kernels.source(), named, device]).encode()).hexdigest()
    return kernel_trial.in_a_process(TRIAL, named, nvrtc.cache_folder() / f"{key}.passed")


def try_cuda(named: str) -> str | None:
    """Try the CUDA kernel in this process.

    Args:
        named: a `Call` as JSON, dtypes by their names.

    Returns:
        What is wrong; None if nothing.
    """
    parts = json.loads(named)
    call = Call(*parts[:2], *(getattr(torch, name) for name in parts[2:5]), *parts[5:])
    return kernel_trial.in_a_thread(lambda: _try(call, True))


def _tried(call: Call, cuda_backward: bool = False) -> str | None:
    trouble = _compared(call, 37, (3, 5), cuda_backward=cuda_backward, reference_gradient=False)
    if trouble is None and cuda_backward:  # compiled apart; in the decoder, reference points may get a gradient
        trouble = _compared(call, 9, (7, 9), cuda_backward=True, reference_gradient=True)
    return trouble


def _compared(
    call: Call, queries: int, size: tuple[int, int], *, cuda_backward: bool, reference_gradient: bool
) -> str | None:
    device = torch.device(call.device_type, call.device_index)
    draws = torch.Generator().manual_seed(0)  # the draws of the caller stay as they are
    shapes = tuple((size[0] + level, size[1]) for level in range(call.levels))
    tokens = sum(height * width for height, width in shapes)

    def draw(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=draws).to(device, dtype).requires_grad_()

    value = draw(2, tokens, call.heads, call.dim, dtype=call.value_dtype)
    offsets = draw(2, queries, call.heads, call.levels, call.points, 2, dtype=call.offsets_dtype)
    logits = draw(2, queries, call.heads, call.levels * call.points, dtype=call.logits_dtype)
    reference = draw(2, queries, call.levels, call.coordinates, dtype=torch.float32).detach().sigmoid()
    inputs: tuple[Tensor, ...] = (value, offsets, logits)
    if reference_gradient:
        inputs = (*inputs, reference.requires_grad_())
    grad = torch.randn((2, queries, call.heads * call.dim), generator=draws).to(device, call.value_dtype)

    flat = [side for shape in shapes for side in shape]
    out = fused.deformable_attention(
        value.transpose(1, 2).contiguous(), reference, offsets, logits, flat, cuda_backward
    )
    expected = _in_pytorch(value, shapes, reference, offsets, logits)
    actuals = (out, *torch.autograd.grad(out, inputs, grad))
    expecteds = (expected, *torch.autograd.grad(expected, inputs, grad))
    names = ("output", *(f"gradient of {name}" for name in ("values", "offsets", "logits", "reference points")))
    for name, actual, target in zip(names, actuals, expecteds, strict=False):
        target = target.detach().float()
        off = float((actual.detach().float() - target).abs().max() / target.abs().max())
        if not off < 0.02:
            return f"its {name} is off by {off:.1%} of the largest"
    return None
