"""Deformable attention alone: `python -m benchmarks op`.

At 800 x 1066 pixels with 8 heads of 32 channels, 4 levels and 4 points; the encoder asks for every cell (17,821 queries
with reference points at their centres), the decoder for 900 + 200 queries with boxes. All contestants start from raw
offsets and logits, and include the softmax:

- stacked: our own plain formulation of the published fallback: `grid_sample` level by level, all samples stacked, then
  weighted and summed.
- ours: as used in training: gathered rows of channels on a CPU, level by level elsewhere.
- ours, detecting: as used for many queries in evaluation on a CPU; forward only.
- kernel: the Triton kernel on a GPU, including the copy to head-major order.

On a CPU: one thread, seconds of that thread. On a GPU: CUDA events around several calls, float32 and bfloat16; bytes
are those that must be moved at least once, additions are the float32 atomics of the backward pass.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import by_events, environment, interleaved, save, table
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention, dispatch, set_implementation
from dino_lightning.model.deformable_attention import gathered as on_a_cpu
from dino_lightning.model.token_geometry import token_geometry

SHAPES = ((100, 134), (50, 67), (25, 34), (13, 17))
SMALL_SHAPES = ((2, 3),)  # for Triton's interpreter
HEADS, DIM, POINTS = 8, 32, 4
TOKENS = sum(height * width for height, width in SHAPES)
DECODER_QUERIES = 900 + 200
BASELINE = "stacked"
SPREAD = 2.0  # standard deviation of the offsets, in cells or in eighths of a box


@dataclass(frozen=True)
class Inputs:
    """The inputs of the sampling core of an attention layer; see `dispatch.sample`."""

    value: Tensor
    reference_points: Tensor
    sampling_offsets: Tensor
    attention_logits: Tensor
    grad: Tensor
    shapes: tuple[tuple[int, int], ...] = SHAPES

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors whose gradients training computes."""
        return self.value, self.sampling_offsets, self.attention_logits


def draw(
    case: str,
    batch: int,
    device: str,
    dtype: torch.dtype,
    *,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    initial: bool = False,
) -> Inputs:
    """Inputs of the encoder or the decoder, the same on every device.

    Args:
        case: encoder or decoder.
        batch: images.
        device: of the tensors.
        dtype: of all but the reference points.
        shapes: (height, width) of each level.
        initial: the offsets of a new model, the same for all queries, which lie on the centres of cells in the encoder.
    """
    draws = torch.Generator().manual_seed(1)
    tokens = sum(height * width for height, width in shapes)
    queries = tokens if case == "encoder" else min(DECODER_QUERIES, tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draws).to(device, dtype)

    if case == "encoder":
        sizes = torch.tensor([shapes], dtype=torch.float32)
        geometry = token_geometry(shapes, sizes, torch.ones(1, len(shapes), 2), padded=False)
        reference = geometry.reference_points().expand(batch, -1, -1, -1).contiguous()
    else:
        boxes = torch.rand((batch, queries, 4), generator=draws) * torch.tensor([1.0, 1.0, 0.4, 0.4])
        reference = boxes[:, :, None].expand(-1, -1, len(shapes), -1).contiguous()
    offsets = normal(batch, queries, HEADS, len(shapes), POINTS, 2) * SPREAD
    if initial:
        layer = MultiScaleDeformableAttention(
            hidden_dim=HEADS * DIM, num_levels=len(shapes), num_heads=HEADS, num_points=POINTS
        )
        of_new_model = layer.sampling_offsets.bias.detach().view(offsets.shape[2:])
        offsets = of_new_model.to(device, dtype).expand_as(offsets).contiguous()
    return Inputs(
        value=normal(batch, tokens, HEADS, DIM).requires_grad_(),
        reference_points=reference.to(device),
        sampling_offsets=offsets.detach().requires_grad_(),
        attention_logits=normal(batch, queries, HEADS, len(shapes) * POINTS).requires_grad_(),
        grad=normal(batch, queries, HEADS * DIM),
        shapes=shapes,
    )


def places_and_weights(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(B, Q, H, L, P, 2) and (B, Q, H, L, P), float32."""
    weights = inputs.attention_logits.float().softmax(-1).view(inputs.sampling_offsets.shape[:-1])
    reference, offsets = inputs.reference_points[:, :, None, :, None].float(), inputs.sampling_offsets.float()
    if reference.shape[-1] == 2:
        return reference + offsets / _widths_and_heights(inputs.shapes, reference.device)[:, None], weights
    return reference[..., :2] + offsets / POINTS * reference[..., 2:] * 0.5, weights


@cache  # made once: a CUDA graph may not copy from the host
def _widths_and_heights(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(L, 2) float32."""
    return torch.tensor([(width, height) for height, width in shapes], dtype=torch.float32, device=device)


def stacked(inputs: Inputs) -> Tensor:
    """(B, Q, H * D): every sample of every level at once, then their weighted sum."""
    places, weights = places_and_weights(inputs)
    value = inputs.value.float()
    batch, _, heads, dim = value.shape
    queries = places.shape[1]
    samples = []
    maps = value.split([height * width for height, width in inputs.shapes], dim=1)
    for level, (height, width) in enumerate(inputs.shapes):
        image = maps[level].flatten(2).transpose(1, 2).reshape(batch * heads, dim, height, width)
        grid = (2 * places[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    each = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    out = (torch.stack(samples, dim=-2).flatten(-2) * each).sum(-1)
    return out.view(batch, heads * dim, queries).transpose(1, 2).to(inputs.value.dtype)


def trained_as(inputs: Inputs) -> Tensor:
    """(B, Q, H * D), computed as on a CPU in training."""
    set_implementation("pytorch")
    return dispatched(inputs)


def kernel(inputs: Inputs) -> Tensor:
    """(B, Q, H * D), computed as on a GPU."""
    set_implementation("triton")
    return dispatched(inputs)


def cuda_backward(inputs: Inputs) -> Tensor:
    """(B, Q, H * D), computed as by `kernel`, with the backward pass in CUDA C++."""
    set_implementation("cuda")
    return dispatched(inputs)


def dispatched(inputs: Inputs) -> Tensor:
    """(B, Q, H * D), computed by the chosen implementation."""
    return dispatch.sample(
        inputs.value, inputs.shapes, inputs.reference_points, inputs.sampling_offsets, inputs.attention_logits
    )


def gathered(inputs: Inputs) -> Tensor:
    """(B, Q, H * D), computed as on a CPU."""
    places, weights = places_and_weights(inputs)
    return on_a_cpu.gathered(inputs.value, inputs.shapes, places, weights)


def forward(attend: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
    """Run the forward pass; gradients are enabled, so that the path of training runs, but not computed."""
    value, offsets, logits = (leaf.detach() for leaf in inputs.leaves)
    return attend(replace(inputs, value=value, sampling_offsets=offsets, attention_logits=logits))


def both(attend: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Run the forward and the backward pass."""
    return torch.autograd.grad(attend(inputs), inputs.leaves, inputs.grad)


def largest_difference(attend: Mapping[str, Callable[[Inputs], Tensor]], inputs: Inputs) -> dict[str, float]:
    """Largest difference of each output from the stacked one, as a share of its largest entry."""
    expected = forward(stacked, inputs).float()
    return {
        name: float((forward(call, inputs).float() - expected).abs().max() / expected.abs().max())
        for name, call in attend.items()
    }


def least_bytes(inputs: Inputs, *, backward: bool) -> int:
    """Bytes read and written at least once: inputs and output; backward, also all gradients, maps in float32."""
    tensors = (inputs.value, inputs.reference_points, inputs.sampling_offsets, inputs.attention_logits, inputs.grad)
    once = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if not backward:
        return once
    small = inputs.leaves[1:]
    return once + sum(tensor.numel() * tensor.element_size() for tensor in small) + 4 * inputs.value.numel()


def corners_inside(inputs: Inputs) -> int:
    """Number of sample corners on a map: each costs one addition for every channel in the backward pass."""
    places, _ = places_and_weights(inputs)
    count = 0
    for level, (height, width) in enumerate(inputs.shapes):
        size = torch.tensor([width, height], device=places.device)
        column, row = (places[:, :, :, level] * size - 0.5).floor().unbind(-1)
        columns = ((column >= 0) & (column < width)).int() + ((column >= -1) & (column < width - 1)).int()
        rows = ((row >= 0) & (row < height)).int() + ((row >= -1) & (row < height - 1)).int()
        count += int((columns * rows).sum())
    return count


def measure(case: str, options: argparse.Namespace, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The times of all contestants of one case, forward and backward."""
    inputs = draw(case, options.batch, device, dtype)
    trained: dict[str, Callable[[Inputs], Tensor]] = {"stacked": stacked, "ours": trained_as}
    if device == "cuda":
        trained["kernel"] = kernel
    detecting = trained if device == "cuda" else trained | {"ours, detecting": gathered}
    directions = {"forward": (forward, detecting), "forward and backward": (both, trained)}
    result: dict[str, Any] = {"difference": largest_difference(detecting, inputs)}
    for direction, (run, contestants) in directions.items():
        calls = {name: partial(run, attend, inputs) for name, attend in contestants.items()}
        if device == "cuda":
            timings = by_events(calls, rounds=options.rounds, repeats=options.repeats)
        else:
            timings = interleaved(calls, rounds=options.rounds, clock=time.thread_time)
        result[direction] = {
            "ratio": {name: timings[BASELINE].median / timing.median for name, timing in timings.items()},
            "seconds": {name: timing.as_json() for name, timing in timings.items()},
        }
    if device == "cuda":
        alone = result["forward"]["seconds"]["kernel"]["median"]
        backward = result["forward and backward"]["seconds"]["kernel"]["median"] - alone
        additions = corners_inside(inputs) * DIM
        result["kernel"] = {
            "forward GB/s": least_bytes(inputs, backward=False) / alone / 1e9,
            "backward GB/s": least_bytes(inputs, backward=True) / backward / 1e9,
            "float32 additions": additions,
            "additions per second": additions / backward,
        }
    return result


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks op", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=10, help="calls in each round, on a GPU")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtypes = {"float32": torch.float32}
    if options.device == "cuda":
        dtypes["bfloat16"] = torch.bfloat16
    rows = [("case", "direction", "implementation", "ms", "spread", "ratio", "off")]
    results: dict[str, Any] = {}
    for case, dtype in tqdm([(case, dtype) for dtype in dtypes for case in ("encoder", "decoder")], "cases"):
        found = measure(case, options, options.device, dtypes[dtype])
        results[f"{case} {dtype}"] = found
        for direction in ("forward", "forward and backward"):
            for name, seconds in found[direction]["seconds"].items():
                rows.append(
                    (
                        f"{case} {dtype}" if name == BASELINE and direction == "forward" else "",
                        direction if name == BASELINE else "",
                        name,
                        f"{seconds['median'] * 1e3:.2f}",
                        f"{seconds['spread']:.0%}",
                        f"{found[direction]['ratio'][name]:.2f}x",
                        f"{found['difference'][name]:.1e}" if direction == "forward" else "",
                    )
                )
    print(
        f"{TOKENS} tokens, {HEADS} heads x {DIM}, {len(SHAPES)} levels, {POINTS} points, {options.batch} image(s), "
        f"{options.rounds} rounds, on {options.device}\n"
    )
    print(table(rows))
    for case, found in results.items():
        if "kernel" in found:
            print(f"{case}, kernel: " + ", ".join(f"{name} {figure:.4g}" for name, figure in found["kernel"].items()))
    if options.output is not None:
        settings = {name: setting for name, setting in vars(options).items() if name != "output"}
        save(options.output, {"environment": environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
