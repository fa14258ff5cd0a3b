"""Bytes that the encoder moves in a training step: `python -m benchmarks traffic`.

A count, not a time: nothing is computed, the tensors only have shapes, so it is the same on every machine. Each
operation reads its inputs and writes its outputs once, whatever a cache holds; what is broadcast is read once. The
encoder of R50 4-scale, by default in bfloat16, on the way that a CUDA device takes: tokens in float32, deformable
attention and residual norms as one operation each way.
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import environment, save, table
from benchmarks.operations import NO_LAUNCHES
from benchmarks.peers import DTYPES
from dino_lightning.cli.command import HelpFormatter
from dino_lightning.model import residual_norm
from dino_lightning.model.deformable_attention import dispatch
from dino_lightning.model.encoder import Encoder
from dino_lightning.model.token_geometry import TokenGeometry, token_geometry

PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation"}
OVERWRITES = {"aten::copy_", "aten::zero_", "aten::fill_"}  # without reading what was there, as outputs given do
DIM, LEVELS, STRIDES = 256, 4, (8, 16, 32, 64)


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, returns = func._schema.name, func._schema.returns
        is_view = bool(returns) and all(one.alias_info and not one.alias_info.is_write for one in returns)
        if not is_view and name not in NO_LAUNCHES:
            given = {one.name for one in func._schema.arguments if one.kwarg_only and one.is_out}
            read = {key: value for key, value in (kwargs or {}).items() if key not in given}
            tensors = [one for one in tree_leaves((args, read, out)) if isinstance(one, Tensor)]
            tensors = tensors[1:] if name in OVERWRITES else tensors
            self.moved[name] += sum(
                min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()) for tensor in tensors
            )
        return out


def kind(name: str) -> str:
    """What an operation is: a matrix product, deformable attention, or elementwise, as sums and norms are, too."""
    if name in PRODUCTS:
        return "products"
    return "deformable attention" if name.startswith("dino_lightning::deformable_attention") else "elementwise"


def encoder_traffic(
    height: int, width: int, size: int, precision: str = "bf16", *, padded: bool = True
) -> dict[str, Counter[str]]:
    """The bytes moved by forward and backward pass of the encoder, by the name of the operation.

    Args:
        height: of the canvas, in pixels.
        width: of the canvas, in pixels.
        size: images in the batch.
        precision: `bf16`, `fp16` or `fp32`.
        padded: whether some images are smaller than the canvas.
    """
    parts = {"forward": Traffic(), "backward": Traffic()}
    dtype = DTYPES[precision]
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        for implementation in (dispatch, residual_norm):
            stack.enter_context(mock.patch.object(implementation, "_takes_kernel", lambda *_: True))
        encoder = Encoder(
            num_layers=6, hidden_dim=DIM, num_levels=LEVELS, num_heads=8, num_points=4, ffn_dim=2048, dropout=0.0
        )
        geometry = _geometry(height, width, size, padded=padded)
        assert geometry.position is not None
        tokens = torch.empty(size, geometry.position.shape[1], DIM, requires_grad=True)
        position = geometry.position.requires_grad_()  # of which the level embedding is a part
        embedding = torch.empty(LEVELS, DIM, requires_grad=True)
        with parts["forward"], torch.autocast("cpu", dtype, enabled=dtype is not None):
            memory = encoder(tokens, position, geometry, embedding)
        grad = torch.empty_like(memory)
        with parts["backward"]:
            torch.autograd.grad(memory, [tokens, position, embedding, *encoder.parameters()], grad)
    return {name: part.moved for name, part in parts.items()}


def by_kind(moved: Counter[str]) -> Counter[str]:
    """Sums of bytes by `kind`."""
    kinds: Counter[str] = Counter()
    for name, count in moved.items():
        kinds[kind(name)] += count
    return kinds


def _geometry(height: int, width: int, size: int, *, padded: bool) -> TokenGeometry:
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    images = size if padded else 1
    cells = torch.tensor(shapes, dtype=torch.float32).expand(images, -1, -1)
    return token_geometry(shapes, cells, torch.ones(images, LEVELS, 2), padded=padded, dim=DIM)


def main() -> None:
    """Count and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks traffic",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--size", default="800x1333", help="height x width")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--precision", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--unpadded", action="store_true", help="all images as large as the canvas")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    parts = encoder_traffic(height, width, options.batch_size, options.precision, padded=not options.unpadded)
    rows = [("GB", *parts)]
    kinds = {name: by_kind(moved) for name, moved in parts.items()}
    for what in ("products", "deformable attention", "elementwise"):
        rows.append((what, *(f"{kinds[part][what] / 1e9:.2f}" for part in parts)))
    largest = sum(parts.values(), Counter[str]()).most_common()
    for name, _ in [one for one in largest if kind(one[0]) == "elementwise"][:10]:
        rows.append((f"  {name}", *(f"{moved[name] / 1e9:.2f}" for moved in parts.values())))
    print(table(rows))
    if options.output is not None:
        result = {name: dict(moved) for name, moved in parts.items()}
        save(options.output, {"environment": environment(), "result": result})


if __name__ == "__main__":
    main()
