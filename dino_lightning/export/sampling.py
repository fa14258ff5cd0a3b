"""The sampling core of deformable attention as runtimes on a CPU compute it fastest; for exported graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention
from dino_lightning.model.deformable_attention.reference import sampling_locations


def sample(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """As `deformable_attention.dispatch.sample`, with the queries last in all that is sampled and summed.

    Runtimes sum over any dimension but the last by adding whole vectors; the points of a level are only four numbers.
    The maps are laid out once, for all levels.
    """
    batch, _, heads, dim = value.shape
    queries, levels, points = sampling_offsets.shape[1], sampling_offsets.shape[3], sampling_offsets.shape[4]
    locations = sampling_locations(reference_points, sampling_offsets, spatial_shapes)
    grids = (2 * locations - 1).permute(0, 2, 3, 4, 1, 5).reshape(batch * heads, levels, points, queries, 2)
    weights = attention_logits.softmax(-1).permute(0, 2, 3, 1).reshape(batch * heads, 1, levels, points, queries)
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, dim, value.shape[1])
    out, start = None, 0
    for level, (height, width) in enumerate(spatial_shapes):
        image = maps[:, :, start : start + height * width].reshape(batch * heads, dim, height, width)
        samples = F.grid_sample(image, grids[:, level], mode="bilinear", padding_mode="zeros", align_corners=False)
        part = (samples * weights[:, :, level]).sum(2)
        out, start = part if out is None else out + part, start + height * width
    assert out is not None
    return out.view(batch, heads * dim, queries).transpose(1, 2)


@contextmanager
def exported_sampling(model: nn.Module) -> Iterator[None]:
    """With `sample` in all deformable attention of a model, while it is traced."""
    layers = [layer for layer in model.modules() if isinstance(layer, MultiScaleDeformableAttention)]
    before = [layer.sample for layer in layers]
    try:
        for layer in layers:
            layer.sample = sample
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.sample = own
