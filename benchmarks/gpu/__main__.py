"""The process of one part: `python -m benchmarks.gpu SETTINGS`, started by `benchmarks.gpu.run_part` only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.gpu.report import Report, by_reference


def main() -> None:
    """Run the part that the settings name."""
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if settings["device"] == "cuda" and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device; --device cpu runs the parts at small sizes.")
    by_reference(settings["call"])(Report(settings))


if __name__ == "__main__":
    main()
