"""The module of another commit, in a process of its own, that detects when it is asked to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# Runs with the other commit's package, of which it needs only what has been there for long.
_PROGRAM = """
import json, sys
import torch
from dino_lightning.structures import Batch

given = json.loads(sys.argv[1])
torch.set_num_threads(given["threads"])
if given["checkpoint"] is None:
    from dino_lightning.training.module import DINOModule
    module = DINOModule(**given["settings"])
else:
    from dino_lightning.inference.detector import load_module
    module = load_module(given["checkpoint"])
module = module.eval().to(given["device"])
batch = Batch.from_images(list(torch.randint(0, 256, given["shape"], dtype=torch.uint8))).to(given["device"])
print("ready", flush=True)
for _ in sys.stdin:
    with torch.inference_mode():
        module(batch)
    if given["device"] == "cuda":
        torch.cuda.synchronize()
    print("done", flush=True)
"""


class OtherCommit:
    """The detector of a checkout, for random images.

    Args:
        folder: the checkout.
        settings: of its `DINOModule`.
        checkpoint: to load instead, or None.
        shape: (B, 3, H, W) of the images.
        device: "cpu" or "cuda".

    Raises:
        SystemExit: the folder has no package of ours, or it does not run.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], checkpoint: str | None, shape: Sequence[int], device: str
    ) -> None:
        if not (folder / "dino_lightning" / "__init__.py").is_file():
            raise SystemExit(f"--before {folder} is no checkout: it has no folder dino_lightning.")
        threads = torch.get_num_threads()
        given = {
            "settings": dict(settings),
            "checkpoint": None if checkpoint is None else str(Path(checkpoint).resolve()),
            "shape": list(shape),
            "device": device,
            "threads": threads,
        }
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(given)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._expect("ready")

    def detect(self) -> None:
        """Detect once, and wait for the end of it."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._expect("done")

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()

    def _expect(self, word: str) -> None:
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != word:
            self.close()
            raise SystemExit(f"The module of {self.folder} ended with exit code {self.process.returncode}, see above.")
