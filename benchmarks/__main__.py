"""`python -m benchmarks NAME`: run one of the measurements."""

from __future__ import annotations

import importlib
import shutil
import sys

from dino_lightning.console import wrapped

NAMES = {
    "data": "images per second and core, from the file to the batch",
    "annotations": "CPU seconds and memory of reading a file as large as COCO's",
    "op": "deformable attention alone",
    "match": "matching and losses",
    "gpu": "everything that a GPU can say, in ten minutes",
    "step": "a whole training step, and its time by phase",
    "operations": "launches of a training step, by part",
    "traffic": "bytes that the encoder moves in a training step",
    "sync": "operators and device synchronisations in a training step",
    "eval": "COCO's average precision",
    "ddp": "two processes compared with one",
    "latency": "milliseconds from a batch to its boxes, compared with other detectors",
    "predict": "images per second of predict, as a share of what its model alone does",
    "race": "AP, AP50 and F1 over minutes of training, compared with other detectors",
    "ladder": "the configurations from fast to accurate: milliseconds, and accuracy after equal minutes",
    "pretrain": "weights that know floor plans, from drawn ones alone",
    "converge": "accuracy and seconds of the demo, for several seeds",
}


def main() -> int:
    """Run the named measurement, which parses the rest of the command line; returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        width = max(map(len, NAMES))
        table = "\n".join(f"  {name:<{width}}  {what}" for name, what in NAMES.items())
        columns = shutil.get_terminal_size().columns
        print(wrapped(f"usage: python -m benchmarks NAME [--help | options]\n\n{table}", columns))
        return 0 if name in ("-h", "--help") else 2
    del sys.argv[1]
    importlib.import_module(f"benchmarks.{name}").main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
