"""Tries the CUDA kernel in a process of its own: a wrong access to memory ends this process, and no training."""

from __future__ import annotations

import sys

from dino_lightning.model.deformable_attention.dispatch import try_cuda


def main(named: str) -> int:
    """Print what is wrong with the kernel for a `Call` in JSON, on one line; returns the exit code, 0 if nothing is."""
    trouble = try_cuda(named)
    if trouble is not None:
        print(" ".join(trouble.split()))
    return 0 if trouble is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
