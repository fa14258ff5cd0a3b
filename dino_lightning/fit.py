"""The main job: `python -m dino_lightning.fit`. Without arguments it trains on floor plans that it draws itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_lightning.cli.arguments import config_path
from dino_lightning.cli.lightning_cli import main
from dino_lightning.console import say
from dino_lightning.floor_plans import write_rooms_dataset


def demo_arguments() -> list[str]:
    """Draw the demo's floor plans, once, and give the arguments to train on them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_lightning"
    root = cache / "rooms-clean"
    say(
        "No arguments: the demo. It draws 300 floor plans, trains a small DINO from scratch to find the rooms on them\n"
        "(a few minutes on two CPU cores) and shows what it found in a picture. For your own data:\n"
        "    python -m dino_lightning.fit --data.root DIR            (all options: --help)\n"
        f"Floor plans: {root}\n"
    )
    write_rooms_dataset(root, num_train=240, num_val=60, style="clean", seed=0)
    return ["--config", str(config_path("rooms_demo.yaml")), "--data.root", str(root)]


def run(args: Sequence[str]) -> int:
    """Train; returns the exit code."""
    return main("fit", args or demo_arguments())


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
