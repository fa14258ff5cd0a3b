"""The command `rooms`: synthetic floor plans as a COCO dataset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino_lightning.cli.command import PROGRAM, CommandParser, run_command, writing
from dino_lightning.errors import UsageError

DESCRIPTION = """Draw synthetic floor plans as a COCO dataset: DIR/{train,val}/annotations.json and images/.

A dataset that is already there with the same options is used as it is; one with other options is refused.
"""


def run(args: Sequence[str]) -> int:
    """Draw a dataset; returns the exit code."""

    def action() -> int:
        parser = CommandParser(
            f"{PROGRAM} rooms", DESCRIPTION, epilog=f"Example: {PROGRAM} rooms --root plans --style realistic"
        )
        add = parser.add_argument
        add("--root", required=True, type=Path, help="folder of the dataset")
        add("--num_train", type=int, default=240, help="plans to train on (240)")
        add("--num_val", type=int, default=60, help="held-out plans (60)")
        add("--style", choices=("clean", "realistic"), default="clean", help="small and plain, or as real ones (clean)")
        add("--seed", type=int, default=0, help="0 or more; another seed draws other plans (0)")
        add("--size", type=int, help="long side of the pages in pixels (drawn from the range of the style)")
        add("--overwrite", action="store_true", help="replace a dataset of drawn plans with other options")
        options = parser.parse_args(args)
        from dino_lightning.floor_plans import write_rooms_dataset  # takes a second to import

        try:
            with writing(options.root, "--root"):
                print(write_rooms_dataset(**vars(options)))
        except ValueError as error:
            raise UsageError(str(error).replace("or overwrite it", "or --overwrite to replace it")) from error
        return 0

    return run_command(action)
