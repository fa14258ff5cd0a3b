"""The main job: `python -m dino_lightning.fit`. Without arguments it trains on floor plans that it draws itself."""

from __future__ import annotations

from dino_lightning.interrupts import ended, handle_ctrl_c

if __name__ == "__main__":
    handle_ctrl_c()  # before the imports that take time

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dino_lightning.cli.command import run_command
from dino_lightning.cli.config_files import config_path
from dino_lightning.cli.help_pages import help_page
from dino_lightning.console import say


def demo_arguments() -> list[str]:
    """Draw the demo's floor plans, once, and give the arguments to train on them."""
    from dino_lightning.floor_plans import write_rooms_dataset  # takes a second to import

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_lightning"
    root = cache / "rooms-clean"
    say(
        "No arguments: the demo. It draws 300 floor plans, trains a small DINO to find the rooms on them, from\n"
        "weights that come with the package (about a minute on two CPU cores), and shows what it found in an image.\n"
        "For your own data:\n"
        "    python -m dino_lightning.fit --data.root DIR            (all options: --help)\n"
        f"Floor plans: {root}\n"
    )
    write_rooms_dataset(root, num_train=240, num_val=60, style="clean", seed=0)
    return ["--config", str(config_path("rooms_demo.yaml")), "--data.root", str(root)]


def run(args: Sequence[str]) -> int:
    """Train; returns the exit code."""
    page = help_page("fit", args)
    if page is not None:
        print(page)
        return 0

    def action() -> int:
        given = args or demo_arguments()
        from dino_lightning.cli.running import run_subcommand  # takes seconds to import

        return run_subcommand("fit", given)

    return run_command(action)


if __name__ == "__main__":
    sys.exit(ended(run(sys.argv[1:])))
