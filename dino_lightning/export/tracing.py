"""Tracing a detector by `torch.export`: with sizes left open, or for images of one size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dino_lightning.export.formulation import exported_formulation
from dino_lightning.export.traceable import CanvasDetector, TraceableDetector, TraceablePreprocessing
from dino_lightning.training.module import DINOModule

Size = tuple[int, int]


def traced_detector(module: DINOModule, static: Size | None = None) -> torch.export.ExportedProgram:
    """The `TraceableDetector` of a module; with `static` for one image in a canvas of that (height, width).

    It samples by `formulation.grid_sample`; see `sampled_by_pytorch`.
    """
    detector = _detector(module)
    if static is not None:
        sizes = torch.tensor([static])
        return _traced(detector, (torch.zeros(1, 3, *static), sizes, sizes.clone()))
    # Large enough for two cells and more on the coarsest level: PyTorch takes a size of 1 in an example for a constant.
    coarsest = 32 * 2 ** len(module.model.neck.projections)
    sizes = torch.tensor([[3 * coarsest, 4 * coarsest], [2 * coarsest, 3 * coarsest]])
    images = torch.zeros(2, 3, 3 * coarsest, 4 * coarsest)
    dynamic = torch.export.Dim.DYNAMIC
    # a clone: one tensor in two places would be traced as one argument
    example = (images, sizes, sizes.clone())
    return _traced(detector, example, ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic}, {0: dynamic}))


def traced_canvas(module: DINOModule, static: Size) -> torch.export.ExportedProgram:
    """The `CanvasDetector` of a module for one image of that (height, width)."""
    return _traced(CanvasDetector(_detector(module), static).eval(), (torch.zeros(1, 3, *static, dtype=torch.uint8),))


def traced_preprocessing(module: DINOModule, sizes: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The `TraceablePreprocessing` of a module; `sizes` are its arguments."""
    preparing = TraceablePreprocessing(module.model, **sizes).eval()
    images = torch.zeros(2, 3, 190, 274, dtype=torch.uint8)
    dynamic = torch.export.Dim.DYNAMIC
    return _traced(preparing, (images,), ({0: dynamic, 2: dynamic, 3: dynamic},))


def _detector(module: DINOModule) -> TraceableDetector:
    options = {name: module.hparams[name] for name in ("max_detections", "nms_iou_threshold")}
    return TraceableDetector(module.model, **options).eval()


def sampled_by_pytorch(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, changed to sample by PyTorch's own operation, so that it runs without this package."""
    for node in program.graph.nodes:
        if node.target is torch.ops.dino_lightning.grid_sample.default:
            node.target = torch.ops.aten.grid_sampler_2d.default
            node.args = (*node.args, 0, 0, False)  # bilinear, zeros outside, corners not aligned
    program.graph_module.recompile()
    return program


def _traced(
    part: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...] | None = None
) -> torch.export.ExportedProgram:
    with _plain_attention(), exported_formulation(part), _SlicesForLists(), torch.no_grad(), quiet():
        return torch.export.export(part, example, dynamic_shapes=shapes, strict=False)


class _SlicesForLists(TorchFunctionMode):
    """Slices in place of operations whose result is a list of tensors.

    ONNX has sequences for lists, which TensorRT and the reader of OpenCV do not take.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        function: Callable[..., Any] = SLICES.get(func, func)
        return function(*args, **(kwargs or {}))


def _split(tensor: Tensor, split_size_or_sections: int | Sequence[int], dim: int = 0) -> tuple[Tensor, ...]:
    sizes = split_size_or_sections
    if isinstance(sizes, int):
        length = tensor.shape[dim]
        sizes = [min(sizes, length - start) for start in range(0, length, sizes)]
    return tuple(tensor.narrow(dim, end - size, size) for size, end in zip(sizes, accumulate(sizes), strict=True))


def _chunk(tensor: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _unbind(tensor: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
    return tuple(tensor.select(dim, index) for index in range(tensor.shape[dim]))


SLICES: dict[Callable[..., Any], Callable[..., tuple[Tensor, ...]]] = {
    torch.split: _split,
    torch.Tensor.split: _split,
    torch.chunk: _chunk,
    torch.Tensor.chunk: _chunk,
    torch.unbind: _unbind,
    torch.Tensor.unbind: _unbind,
}


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without PyTorch's own kernel for attention in evaluation, which ONNX does not have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter's warnings about its own internals, which the user cannot act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
