"""The limits of the fused kernels, for the kernels themselves and for whoever decides whether to use them."""

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIMS = (8, 16, 32, 64, 128)  # channels of a head
MAX_LEVELS = 8  # the kernels have that many arguments for sizes
MAX_SIDE = 2**15 - 1  # height and width share an integer of 32 bits
