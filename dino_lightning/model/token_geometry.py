"""Where the tokens of all levels lie: shapes, padding, centres and position embedding, for all levels at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dino_lightning.model.position_encoding import IMAGE_TEMPERATURE, image_position_embedding


@dataclass(frozen=True)
class TokenGeometry:
    """The places of S tokens, L levels laid end to end from the finest to the coarsest.

    A batch without padding has one geometry for all of its images: B is 1 then, and broadcasts.

    Attributes:
        spatial_shapes: (height, width) of each level, on the host.
        valid_ratios: (B, L, 2) float32, share of width and height that is not padding.
        padding_mask: (B, S) bool, True = padding; None where there is none.
        centres: (B, S, 2) float32, x and y of each cell's centre, 0-1 of the image before padding.
        position: (B, S, D) float32, the sine embedding of the cells; None where it was not asked for.
    """

    spatial_shapes: tuple[tuple[int, int], ...]
    valid_ratios: Tensor
    padding_mask: Tensor | None
    centres: Tensor
    position: Tensor | None = None

    def reference_points(self) -> Tensor:
        """(B, S, L, 2) float32: each centre on each level, 0-1 of the padded map."""
        return self.centres[:, :, None] * self.valid_ratios[:, None]


def token_geometry(
    spatial_shapes: Sequence[tuple[int, int]],
    valid_cells: Tensor,
    valid_ratios: Tensor,
    *,
    padded: bool,
    dim: int | None = None,
    temperature: float = IMAGE_TEMPERATURE,
    offset: float = 0.0,
) -> TokenGeometry:
    """The geometry of levels of which each image fills the top left part.

    Args:
        spatial_shapes: (height, width) of each of the L levels.
        valid_cells: (B, L, 2) float32, rows and columns of each level that are not padding.
        valid_ratios: (B, L, 2) float32, the shares of width and height that they are.
        padded: whether some cells are padding.
        dim: size of the position embedding, a multiple of 4; None for none.
        temperature: of the position embedding.
        offset: of the cells in it, see `image_position_embedding`.
    """
    device = valid_cells.device
    grids = [
        torch.cartesian_prod(torch.arange(height, device=device), torch.arange(width, device=device))
        for height, width in spatial_shapes
    ]
    cells = torch.cat(grids).float()[None]  # (1, S, 2), row and column
    extent = torch.cat(
        [
            valid_cells[:, level, None].expand(-1, height * width, -1)
            for level, (height, width) in enumerate(spatial_shapes)
        ],
        dim=1,
    )
    centres = ((cells + 0.5) / extent).flip(-1)
    inside = cells < extent if padded else None
    position = None
    if dim is not None:
        position = image_position_embedding(cells, extent, inside, dim, temperature, offset)
    return TokenGeometry(
        spatial_shapes=tuple(spatial_shapes),
        valid_ratios=valid_ratios,
        padding_mask=None if inside is None else ~inside.all(-1),
        centres=centres,
        position=position,
    )


def valid_cells(
    image_sizes: Sequence[tuple[int, int]], canvas: tuple[int, int], spatial_shapes: Sequence[tuple[int, int]]
) -> npt.NDArray[np.float32]:
    """How many rows and columns of each level are not padding: (B, L, 2) float32.

    A cell is where its top left corner is, as where a padding mask is resized to the level by taking the nearest.

    Args:
        image_sizes: (height, width) of the B images.
        canvas: (height, width) that they are padded to.
        spatial_shapes: (height, width) of the L levels.
    """
    sizes = np.asarray(image_sizes)
    counts = np.empty((len(sizes), len(spatial_shapes), 2), dtype=np.float32)
    for level, shape in enumerate(spatial_shapes):
        for axis in range(2):
            step = np.float32(canvas[axis]) / np.float32(shape[axis])
            starts = np.floor(np.arange(shape[axis], dtype=np.float32) * step)
            counts[:, level, axis] = np.searchsorted(starts, sizes[:, axis])
    return counts
