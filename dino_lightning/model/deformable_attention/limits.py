"""The limits of the fused kernels, for the kernels themselves and for whoever decides whether to use them."""

from collections.abc import Sequence

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (8, 16, 32, 64, 128)  # channels of a head
MAX_LEVELS = 8  # the kernels have that many arguments for sizes
MAX_SIDE = 2**15 - 1  # height and width share an integer of 32 bits


def packed_sizes(spatial_shapes: Sequence[int]) -> list[int]:
    """Height and width of each level in one integer; zero for the levels that there are not."""
    sizes = [height << 16 | width for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True)]
    return sizes + [0] * (MAX_LEVELS - len(sizes))
