"""The command line: `python -m dino_lightning COMMAND`, or `dino-lightning COMMAND` where the package is installed."""

from __future__ import annotations

from dino_lightning.interrupts import ended, handle_ctrl_c

if __name__ == "__main__":
    handle_ctrl_c()  # before the imports that take time

import difflib
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

from dino_lightning.console import wrapped

# command -> the function that runs it, and what it does; loaded when it is asked for
COMMANDS = {
    "fit": ("dino_lightning.fit:run", "train (without options: a demo on floor plans that it draws itself)"),
    "validate": ("dino_lightning.cli.evaluate:validate", "evaluate a checkpoint on the validation split"),
    "test": ("dino_lightning.cli.evaluate:test", "evaluate a checkpoint on the test split"),
    "predict": (
        "dino_lightning.cli.predict:run",
        "find objects in images, folders or a COCO dataset; writes JSON, CSV and images",
    ),
    "export": (
        "dino_lightning.cli.export:run",
        "write a checkpoint as ONNX, as a torch.export program or as a model directory",
    ),
    "convert": (
        "dino_lightning.cli.convert:run",
        "write a checkpoint in the published layout, or a published one in ours",
    ),
    "weights": (
        "dino_lightning.cli.weights:run",
        "list the weights that training can start from by name; `weights get NAME` fetches them",
    ),
    "inspect": ("dino_lightning.cli.inspect:run", "find what is wrong with a dataset, before training on it"),
    "preview": ("dino_lightning.cli.preview:run", "draw training images as the model sees them, with their boxes"),
    "to_coco": ("dino_lightning.cli.to_coco:run", "write any dataset that fit reads as clean COCO"),
    "rooms": ("dino_lightning.cli.rooms:run", "draw synthetic floor plans as a COCO dataset"),
}


def usage() -> str:
    """The table of commands, as wide as the terminal."""
    lines = "\n".join(f"  {name:<8}  {does}" for name, (_, does) in COMMANDS.items())
    return wrapped(
        f"usage: python -m dino_lightning COMMAND [options]\n\n{lines}\n\n"
        "COMMAND --help lists the options of each; --version says which version this is.",
        shutil.get_terminal_size().columns,
    )


def version() -> str:
    """The installed version; a copy that is not installed, as in a job, has none."""
    try:
        return metadata.version("dino-lightning")
    except metadata.PackageNotFoundError:
        return "unknown version (not installed)"


def run(args: Sequence[str]) -> int:
    """Run a command; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0 if args else 2
    command, *rest = args
    if command == "--version":
        print(f"dino_lightning {version()}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else f"\n\n{usage()}"
        print(f"error: There is no command {command!r}.{hint}", file=sys.stderr)
        return 2
    module, function = COMMANDS[command][0].split(":")
    return int(getattr(import_module(module), function)(rest))


def main() -> int:
    """The console script `dino-lightning`."""
    handle_ctrl_c()
    return ended(run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
