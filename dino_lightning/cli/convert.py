"""The command `convert`: a detector's weights from one layout to another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dino_lightning.cli.checkpoints import LAST, model_file
from dino_lightning.cli.command import PROGRAM, CommandParser, run_command
from dino_lightning.errors import UsageError

DESCRIPTION = """Write the weights of a detector in our layout, in that of published DINO checkpoints, or in that of
detrex or mmdetection.

The layout of a file is recognised by its content. The published one is for the published program and others that read
its files; ours also holds the sizes and class names, so that predict, validate and export take the file as it is.
"""


def run(args: Sequence[str]) -> int:
    """Convert; returns the exit code."""

    def action() -> int:
        options = _parser().parse_args(args)
        from dino_lightning.training.conversion import convert  # takes seconds to import

        place = options.weights
        if place == LAST or Path(place).is_dir():
            place = str(model_file(place))
        try:
            print(convert(place, options.output, options.layout, options.overwrite, options.contiguous))
        except OSError as error:
            raise UsageError(f"{options.output} cannot be written ({error.strerror or error}).") from error
        return 0

    return run_command(action)


def _parser() -> CommandParser:
    parser = CommandParser(
        f"{PROGRAM} convert",
        DESCRIPTION,
        epilog=f"Example: {PROGRAM} convert --weights runs/.../best.ckpt --output published.pth",
    )
    parser.add_argument(
        "--weights",
        required=True,
        help="a checkpoint, published, ours, or of detrex or mmdetection: a file, an address, a name that `weights` "
        "lists, the folder of a run, or 'last': the newest run",
    )
    parser.add_argument("--output", required=True, type=Path, help="the file to write")
    parser.add_argument(
        "--layout",
        choices=("published", "ours", "detrex", "mmdet"),
        help="by default ours, or published for a checkpoint of ours",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --output where it exists")
    parser.add_argument(
        "--contiguous",
        action="store_true",
        help="of a model with COCO's 91 rows keep the 80 that are classes, as labels 0 to 79, with their COCO ids",
    )
    return parser
