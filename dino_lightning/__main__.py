"""The command line: `python -m dino_lightning {fit,validate,test,predict,export,convert,inspect,preview,rooms}`."""

from __future__ import annotations

import sys

USAGE = """usage: python -m dino_lightning COMMAND [options]

  fit        train (without options: a demo on floor plans that it draws itself)
  validate   evaluate a checkpoint on the validation split
  test       evaluate a checkpoint on the test split
  predict    find objects in images, folders or a COCO dataset; writes JSON, CSV and pictures
  export     write a checkpoint as ONNX, as a torch.export program or as a model directory
  convert    write a checkpoint in the published layout, or a published one in ours
  inspect    look for what is wrong with a dataset, before training on it
  preview    draw training images as the model sees them, with their boxes
  rooms      draw synthetic floor plans as a COCO dataset

COMMAND --help lists the options of each.
"""


def run(args: list[str]) -> int:
    """Dispatch to a command; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if args else 2
    command, *rest = args
    if command == "fit":
        from dino_lightning import fit

        return fit.run(rest)
    if command in ("validate", "test"):
        from dino_lightning.cli import lightning_cli as cli

        return cli.main(command, rest)
    if command == "predict":
        from dino_lightning.cli import predict

        return predict.run(rest)
    if command == "export":
        from dino_lightning.cli import export

        return export.run(rest)
    if command == "convert":
        from dino_lightning.cli import convert

        return convert.run(rest)
    if command == "inspect":
        from dino_lightning.cli import inspect as health

        return health.run(rest)
    if command == "preview":
        from dino_lightning.cli import preview

        return preview.run(rest)
    if command == "rooms":
        from jsonargparse import auto_cli

        from dino_lightning.floor_plans import write_rooms_dataset

        try:
            print(auto_cli(write_rooms_dataset, args=rest, as_positional=False))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    print(f"error: there is no command {command!r}.\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
