"""What the two kernels of deformable attention share; imported only where Triton is used.

Softmax, the way from offsets to places, bilinear sampling and the weighted sum happen in registers, so that neither the
places nor the weights nor the samples ever exist in memory; the backward pass works all of them out again.

- One program takes a few queries of one head of one image. The head changes slowest in the grid, so that the programs
  that run at the same time read (and in the backward pass add to) the map of one or two heads. That fits in the L2
  cache of a small GPU: 1.4 MB in bfloat16 at 800 x 1333 and 2.8 MB for its gradient, where all eight heads take 34 MB.
- Channels lie along the lanes, read 16 bytes at a time. Levels are unrolled. Points are not: unrolled, the compiler for
  sm_86 wanted 168 to 255 registers and spilled; as a loop it wants about 50 for bfloat16.
- Everything that is one number for each query stays in one layout: a table of all weights would have another, and cost
  a trip through shared memory for each point.
- Maps may have any size without another compilation: sizes are plain arguments that the compiler may not specialise on.
- Places and sums are float32 whatever the inputs are.
"""

# The language of the kernels has no annotations but `tl.constexpr`, and Triton has no types.
# ruff: noqa: ANN001, ANN201
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl

from dino_lightning.model.deformable_attention.limits import MAX_LEVELS

NUM_WARPS = 4
# What follows from the images. Specialised on them (1, a multiple of 16), a kernel would be compiled again and again.
VARYING = ("num_queries", "num_tokens", *(f"size{level}" for level in range(MAX_LEVELS)))


@triton.jit
def size_of_level(level: tl.constexpr, size0, size1, size2, size3, size4, size5, size6, size7):
    """Height and width of a level, both packed into one integer."""
    if level == 0:
        size = size0
    elif level == 1:
        size = size1
    elif level == 2:
        size = size2
    elif level == 3:
        size = size3
    elif level == 4:
        size = size4
    elif level == 5:
        size = size5
    elif level == 6:
        size = size6
    else:
        size = size7
    return size >> 16, size & 0xFFFF


@triton.jit
def softmax_parts(logits, there, COUNT: tl.constexpr):
    """Largest logit and sum of exponentials of each query, column by column: a table would have another layout."""
    largest = tl.load(logits, there, 0.0).to(tl.float32)
    for number in tl.static_range(1, COUNT):
        largest = tl.maximum(largest, tl.load(logits + number, there, 0.0).to(tl.float32))
    total = tl.zeros_like(largest)
    for number in tl.static_range(COUNT):
        total += tl.exp(tl.load(logits + number, there, 0.0).to(tl.float32) - largest)
    return largest, total


@triton.jit
def axis(place, size):
    """The cell before a place on an axis, kept within two cells of the map, and the way from it to the place, 0 to 1.

    What is not finite stays so in the way, for the sake of those who look for it in the loss.
    """
    before = tl.floor(place)
    inside = tl.minimum(tl.maximum(before, -2.0), size + 1.0)
    return inside.to(tl.int32), place - before


def block_size(dim: int, *, bytes_per_thread: int, itemsize: int, warps: int = NUM_WARPS) -> int:
    """Queries of a program in which every thread holds as many bytes of one query's channels."""
    return max(1, warps * 32 * bytes_per_thread // (itemsize * dim))
