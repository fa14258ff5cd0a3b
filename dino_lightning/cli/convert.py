"""The command `convert`: a detector's weights from one layout to another."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dino_lightning.cli.checkpoints import LAST, model_file
from dino_lightning.cli.command import PROGRAM, CommandParser, run_command, writing
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
        if Path(options.output).exists() and not options.overwrite:
            raise UsageError(f"{options.output} exists; give --overwrite to replace it.")
        from dino_lightning.training.conversion import convert  # takes seconds to import
        from dino_lightning.weights.download import HUB_SCHEME

        place = options.weights
        if place == LAST or Path(place).is_dir():
            place = str(model_file(place))
        if options.output.startswith(HUB_SCHEME):
            _to_hub(place, options)
            return 0
        with writing(options.output, "--output"):
            print(convert(place, Path(options.output), options.layout, options.contiguous))
        return 0

    return run_command(action)


def _to_hub(place: str, options: argparse.Namespace) -> None:
    """Upload a model directory of the weights; the run's configuration, which has paths of this machine, stays here."""
    from dino_lightning.cli.export import fill_model_directory
    from dino_lightning.export.hub import push, repository_of
    from dino_lightning.training.conversion import convert
    from dino_lightning.weights.download import HUB_SCHEME
    from dino_lightning.weights.reading import read_weights
    from dino_lightning.weights.zoo import weights_file

    repository = repository_of(options.output)
    if options.layout not in (None, "ours"):
        raise UsageError(f"--layout {options.layout}: a model directory on the Hugging Face Hub has our layout.")
    with tempfile.TemporaryDirectory() as temporary:
        file, folder = weights_file(place), Path(temporary) / "model"
        if options.contiguous or read_weights(file).source != "dino_lightning checkpoint":
            converted = Path(temporary) / "converted.ckpt"
            convert(place, converted, "ours", options.contiguous)
            file = converted
        folder.mkdir()
        fill_model_directory(file, folder)
        (folder / "config.yaml").unlink(missing_ok=True)
        address = push(folder, repository, options.overwrite)
    print(f"{address}: a model directory with a card. Use it with load_detector({HUB_SCHEME + repository!r}).")
    print("A repository made so is private, and the card names no licence: set both on its page.")


def _parser() -> CommandParser:
    parser = CommandParser(
        f"{PROGRAM} convert",
        DESCRIPTION,
        epilog=f"Example: {PROGRAM} convert --weights best.ckpt --output dino.pth",
    )
    parser.add_argument(
        "--weights",
        required=True,
        help="a checkpoint, published, ours, or of detrex or mmdetection: a file, an address, a name that `weights` "
        "lists, the folder of a run, or 'last': the newest run",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="the file to write; or hf://OWNER/REPO: a model directory with a card, on the Hugging Face Hub",
    )
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
