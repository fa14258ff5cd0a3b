"""What the host has to say about a batch before the device can work on its feature maps without it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dino_lightning.model.denoising import Noise
from dino_lightning.model.kept_result import KeptResult
from dino_lightning.model.token_geometry import TokenGeometry, token_geometry, valid_cells
from dino_lightning.structures import Batch, Targets


@dataclass(frozen=True)
class PreparedInputs:
    """What `DINO.detect` needs beside feature maps.

    Attributes:
        geometry: where the tokens lie.
        targets: of the denoising queries; None for none.
        noise: of theirs; None for none.
    """

    geometry: TokenGeometry
    targets: Targets | None = None
    noise: Noise | None = None


def geometry_of(
    batch: Batch,
    shapes: tuple[tuple[int, int], ...],
    unpadded: KeptResult[TokenGeometry],
    *,
    dim: int,
    temperature: float,
    offset: float,
) -> TokenGeometry:
    """Where the tokens of the levels lie; kept from step to step while nothing is padded and sizes are the same.

    Args:
        batch: of which the sizes count.
        shapes: (height, width) of each level.
        unpadded: keeps the geometry of batches without padding.
        dim: size of the position embedding.
        temperature: of the position embedding.
        offset: of the cells in it.
    """
    canvas, device = (batch.images.shape[-2], batch.images.shape[-1]), batch.images.device
    padded = any(tuple(size) != canvas for size in batch.image_sizes)

    def geometry() -> TokenGeometry:
        # The host knows the sizes: it counts, and one small copy goes to the device.
        cells = valid_cells(batch.image_sizes if padded else [canvas], canvas, shapes)
        ratios = (cells / np.asarray(shapes, dtype=np.float32))[..., ::-1]
        both = torch.from_numpy(np.stack((cells, ratios))).to(device, non_blocking=True)
        return token_geometry(shapes, both[0], both[1], padded=padded, dim=dim, temperature=temperature, offset=offset)

    return geometry() if padded else unpadded.of((), (canvas, shapes, device), geometry)
