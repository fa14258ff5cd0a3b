"""The end of a sublayer, `norm(x + branch)`: as one Triton kernel on CUDA devices, plain PyTorch elsewhere.

A post-norm layer reads its normed sum three times: as the next residual in float32, in autocast's precision for
products, and with the position added. The kernel writes all three at once; separate operations read and write the same
tokens nine times.

| where | what runs with "auto" |
|---|---|
| CUDA device of capability 8.0 or newer, eager | the Triton kernel, if it passes its trial |
| a CPU, compiled or exported code, deterministic mode, tokens that are not float32 | plain PyTorch |
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dino_lightning import kernel_trial
from dino_lightning.model.lower_precision import is_watched, lower_precision

Implementation = Literal["auto", "pytorch", "triton"]
MAX_DIM = 4096  # of a row in registers
MOST_PROGRAMS = 1024  # of the backward pass: each leaves two rows to be summed
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_implementation: Implementation = "auto"


class Normed(NamedTuple):
    """Tokens as their readers want them; the copies are None where plain PyTorch makes them when they are read.

    Attributes:
        exact: (..., D), the residual.
        lowered: (..., D) of autocast's precision, for products.
        positioned: (..., D) of autocast's precision, with the position added.
    """

    exact: Tensor
    lowered: Tensor | None = None
    positioned: Tensor | None = None

    def for_products(self) -> Tensor:
        """The tokens as a product reads them: (..., D)."""
        return self.exact if self.lowered is None else self.lowered

    def at(self, position: Tensor) -> Tensor:
        """(..., D), the tokens with their position added, which is the one that they were normed with, for products."""
        if self.positioned is not None:
            return self.positioned
        total = self.exact + position
        return total.to(lower_precision(total.device.type) or total.dtype)  # once, whatever the number of products


def set_implementation(implementation: Implementation) -> None:
    """Choose how residual norms are computed, in this process, from now on.

    Args:
        implementation: "auto" takes the Triton kernel where it runs and PyTorch elsewhere; "pytorch" never takes the
            kernel; "triton" always does where the dtypes allow it, on CPU tensors too if Triton interprets
            (TRITON_INTERPRET=1 before the start).

    Raises:
        ValueError: there is no such implementation.
    """
    global _implementation
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r} is none of {', '.join(get_args(Implementation))}.")
    _implementation = implementation


def residual_norm(
    x: Tensor,
    branch: Tensor,
    norm: nn.Module,
    *,
    position: Tensor | None = None,
    copies: bool = True,
    level_embedding: Tensor | None = None,
    level_sizes: Sequence[int] = (),
) -> Normed:
    """`norm(x + branch)`, with copies for those who read it, where the kernel makes them at no further reading.

    Args:
        x: (..., D), the residual.
        branch: (..., D), what the sublayer says.
        norm: a layer norm over D.
        position: (..., D) with as many dimensions as x, or with one entry in the first of them for all; added in a
            copy of its own.
        copies: whether a product reads the tokens next, or reads them with their position; else both are left out.
        level_embedding: (L, D), if that alone learns of the position, of which it is a part: its gradient is a sum over
            the tokens of a level, so that none has to be kept for each token. Plain PyTorch keeps them.
        level_sizes: how many of the tokens are of each level.

    Raises:
        RuntimeError: "triton" was asked for, and it cannot be had; says why.
    """
    if not _takes_kernel(x, branch, norm, position):
        return Normed(norm(x + branch))
    low = lower_precision(x.device.type) or torch.float32
    position = position if copies else None
    lowers = copies and low != torch.float32
    if level_embedding is not None and position is not None:
        position = position.detach()
    inputs = (x, branch, norm.weight, norm.bias, position, low, lowers, norm.eps, level_embedding, level_sizes)
    exact, lowered, positioned = _Fused.apply(*inputs)
    return Normed(exact, lowered if lowers else None, positioned)


def _takes_kernel(x: Tensor, branch: Tensor, norm: nn.Module, position: Tensor | None) -> bool:
    if torch.compiler.is_compiling() or _implementation == "pytorch":
        return False
    if _implementation == "auto" and (x.device.type != "cuda" or torch.are_deterministic_algorithms_enabled()):
        return False
    if type(norm) is not nn.LayerNorm or is_watched(norm) or len(norm.normalized_shape) != 1:
        return False  # what somebody has put in its place, or watches, is called
    parameters = (norm.weight, norm.bias)
    if any(one is None or one.dtype != torch.float32 for one in parameters) or x.dtype != torch.float32:
        return False
    if x.shape != branch.shape or x.device != branch.device:
        return False
    low = lower_precision(x.device.type) or torch.float32
    at = torch.float32 if position is None else position.dtype
    call = Call(x.device.type, x.device.index or 0, branch.dtype, at, low, x.shape[-1])
    trouble = _trouble_with(call)
    if trouble is not None and _implementation == "triton":
        raise RuntimeError(f"Residual norms cannot run in Triton: {trouble}.")
    return trouble is None


class _Fused(torch.autograd.Function):
    """Sum, norm and copies; keeps what went in."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        branch: Tensor,
        weight: Tensor,
        bias: Tensor,
        position: Tensor | None,
        low: torch.dtype,
        copies: bool,
        eps: float,
        level_embedding: Tensor | None,
        level_sizes: Sequence[int],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, branch = x.contiguous(), branch.contiguous()
        exact, lowered, positioned = torch.ops.dino_lightning.residual_norm(
            x, branch, weight, bias, None if position is None else position.contiguous(), low, copies, eps
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, branch, weight)
        ctx.low, ctx.eps, ctx.level_sizes = low, eps, level_sizes
        ctx.position = None if position is None else (position.shape, position.dtype)
        return exact, lowered if copies else None, None if position is None else positioned

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_exact: Tensor | None, grad_lowered: Tensor | None, grad_positioned: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, branch, weight = ctx.saved_tensors
        given = (torch.zeros_like(x) if grad_exact is None else grad_exact, grad_lowered, grad_positioned)
        grads = [None if grad is None else grad.contiguous() for grad in given]
        programs = min(MOST_PROGRAMS, -(-x.numel() // (4 * x.shape[-1])))  # of at least four rows
        grad_x, grad_branch, parts = torch.ops.dino_lightning.residual_norm_backward(
            *grads, x, branch, weight, ctx.low, ctx.eps, programs
        )
        by_weight, by_bias = parts.sum(0).unbind()
        by_position = None
        if ctx.needs_input_grad[4] and grads[2] is not None:
            shape, dtype = ctx.position
            shared = shape[0] != x.shape[0]
            by_position = grads[2].sum(0, keepdim=True, dtype=dtype) if shared else grads[2].to(dtype)
        by_levels = None
        if ctx.needs_input_grad[8] and grads[2] is not None:
            levels = torch.split(grads[2], ctx.level_sizes, dim=1)
            by_levels = torch.stack([level.sum((0, 1), dtype=torch.float32) for level in levels])
        grad_branch = grad_x if branch.dtype == x.dtype else grad_branch
        return grad_x, grad_branch, by_weight, by_bias, by_position, None, None, None, by_levels, None


# ---------------------------------------------------------------------- operators: fake tensors have them, too


def _forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from dino_lightning.model import residual_norm_kernels  # here, since it imports Triton

    return residual_norm_kernels.forward(x, *others)


def _backward(grad: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    from dino_lightning.model import residual_norm_kernels

    return residual_norm_kernels.backward(grad, *others)


def _forward_shapes(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    low: torch.dtype,
    copies: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lowered = x.new_empty(x.shape if copies else (0,), dtype=low)
    return torch.empty_like(x), lowered, x.new_empty((0,) if position is None else x.shape, dtype=low)


def _backward_shapes(
    grad_exact: Tensor,
    grad_lowered: Tensor | None,
    grad_positioned: Tensor | None,
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    low: torch.dtype,
    eps: float,
    programs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    by_branch = branch.new_empty((0,) if branch.dtype == x.dtype else branch.shape)
    return torch.empty_like(x), by_branch, x.new_empty(programs, 2, x.shape[-1])


_library: Any = torch.library.Library("dino_lightning", "FRAGMENT")  # type: ignore[no-untyped-call]  # nor its methods
_library.define(
    "residual_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? position, ScalarType low, bool copies, "
    "float eps) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "residual_norm_backward(Tensor grad_exact, Tensor? grad_lowered, Tensor? grad_positioned, Tensor x, Tensor branch, "
    "Tensor weight, ScalarType low, float eps, int programs) -> (Tensor, Tensor, Tensor)"
)
for _name, _kernel, _shapes in (
    ("residual_norm", _forward, _forward_shapes),
    ("residual_norm_backward", _backward, _backward_shapes),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dino_lightning::{_name}", _shapes, lib=_library)


# ---------------------------------------------------------------------- the trial before the kernel is used


class Call(NamedTuple):
    """What the kernel is compiled for; a trial speaks for all calls that are alike in this."""

    device_type: str
    device_index: int
    branch_dtype: torch.dtype
    position_dtype: torch.dtype
    low: torch.dtype
    dim: int


_found: dict[Call, str | None] = {}  # what `_trouble_with` has found


def implementation_in_use(device: torch.device) -> str:
    """Which implementation has computed residual norms on a device in this process, and why where it fell back.

    Args:
        device: of the model.

    Returns:
        On one line, such as "Triton kernel", "PyTorch", or "PyTorch (the device is older than compute capability 8.0)";
        of a CUDA device "not known yet" before the first forward pass.
    """
    return kernel_trial.in_use(_implementation, device, _found)


@functools.cache
def _trouble_with(call: Call) -> str | None:
    """Why the kernel cannot take such calls, or None if it can."""
    trouble = _missing(call)
    if trouble is None and call.device_type != "cpu":
        trouble = kernel_trial.in_a_thread(
            lambda: kernel_trial.allowed_to_wait(call.device_index, lambda: _tried(call))
        )
        if trouble is not None and _implementation == "auto":
            warnings.warn(
                "Residual norms run in plain PyTorch, which moves more memory, since their Triton kernel failed its "
                f"trial on {torch.cuda.get_device_name(call.device_index)} ({trouble}).",
                stacklevel=2,
            )
    _found[call] = trouble
    return trouble


def _missing(call: Call) -> str | None:
    """What can be known without running anything."""
    trouble = kernel_trial.missing(call.device_type, call.device_index)
    if trouble is not None:
        return trouble
    if call.dim > MAX_DIM:
        return f"rows of {call.dim} are longer than {MAX_DIM}"
    dtypes = {call.branch_dtype, call.position_dtype, call.low}
    if not dtypes <= set(DTYPES):
        return f"there is no kernel for {', '.join(sorted(map(str, dtypes - set(DTYPES))))}"
    return None


def _tried(call: Call) -> str | None:
    """Compile and run both directions on a small example, with and without copies; says what is off."""
    device = torch.device(call.device_type, call.device_index)
    draws = torch.Generator().manual_seed(0)  # the draws of the caller stay as they are

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=draws).to(device, dtype).requires_grad_()

    shape = (2, 1037, call.dim)  # more rows than a program takes at a time, and no multiple of it
    inputs = (draw(*shape), draw(*shape, dtype=call.branch_dtype), draw(call.dim), draw(call.dim))
    position = draw(1, *shape[1:], dtype=call.position_dtype)
    grads = (draw(*shape).detach(), *(draw(*shape, dtype=call.low).detach() for _ in range(2)))
    for copies in (True, False):
        leaves = (*inputs, position) if copies else inputs
        found = _Fused.apply(*inputs, position if copies else None, call.low, copies, 1e-5, None, ())
        exact = nn.functional.layer_norm(inputs[0] + inputs[1], (call.dim,), inputs[2], inputs[3])
        expected = (exact, exact.to(call.low), (exact + position).to(call.low)) if copies else (exact,)
        found = found[: len(expected)]
        of_inputs = (torch.autograd.grad(out, leaves, grads[: len(out)]) for out in (found, expected))
        actuals, expecteds = ((*out, *by) for out, by in zip((found, expected), of_inputs, strict=True))
        for number, (actual, target) in enumerate(zip(actuals, expecteds, strict=True)):
            # rounded once at the end; a copy's gradient comes in lower precision, and to both alike
            bound = 1e-4 if actual.dtype == torch.float32 else 0.02
            off = float((actual.float() - target.float()).detach().abs().max() / target.detach().float().abs().max())
            if not off < bound:
                by = [f"gradient of the {of}" for of in ("residual", "branch", "scale", "shift", "position")]
                name = (*("sum", "copy", "copy with position")[: len(expected)], *by)[number]
                return f"its {name} is off by {off:.1%} of the largest"
    return None
