"""The command `weights`: the names of weights that training can start from, and fetching them beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from dino_lightning.cli.command import PROGRAM, CommandParser, run_command
from dino_lightning.console import say
from dino_lightning.errors import UsageError

DESCRIPTION = """List the weights that --model.weights takes by name, or fetch them beforehand. For a machine without
the internet, copy the file that `get` prints to the same place there.

Those of detrex and mmdetection were trained on COCO; AP is what their authors state. Nothing is fetched unless asked.
"""


def run(args: Sequence[str]) -> int:
    """List or fetch; returns the exit code."""

    def action() -> int:
        options = _parser().parse_args(args)
        from dino_lightning.weights.shipped import SHIPPED
        from dino_lightning.weights.zoo import names_like, weights_file, zoo  # takes a second to import

        if options.action is None:
            say(_table())
            return 0
        if not options.names:
            raise UsageError(f"weights get needs a name; `{PROGRAM} weights` lists them.")
        unknown = [name for name in options.names if name not in zoo() and name not in SHIPPED]
        if unknown:
            hint = names_like(unknown[0]) or f" `{PROGRAM} weights` lists the names."
            raise UsageError(f"There are no weights {unknown[0]!r} to fetch.{hint}")
        for name in options.names:
            say(f"{name}: {weights_file(name)}")
        return 0

    return run_command(action)


def _parser() -> CommandParser:
    parser = CommandParser(
        f"{PROGRAM} weights", DESCRIPTION, epilog=f"Example: {PROGRAM} weights get dino_r50_4scale_24ep"
    )
    parser.add_argument("action", nargs="?", choices=("get",), help="fetch weights")
    parser.add_argument("names", nargs="*", metavar="NAME", help="which")
    return parser


def _table() -> str:
    from dino_lightning.weights.foreign_layouts import PROJECTS
    from dino_lightning.weights.shipped import FOLDER, SHIPPED
    from dino_lightning.weights.zoo import at_hand, zoo

    heading = ("name", "backbone", "levels", "epochs", "AP", "here")
    groups: dict[str, list[tuple[str, ...]]] = {}
    for row in zoo().values():
        file = at_hand(row)
        here = "no" if file is None else f"{file.stat().st_size / 1e6:.0f} MB"
        cells = (row.name, row.backbone, str(row.levels), str(row.epochs), f"{row.ap:.1f}", here)
        groups.setdefault(f"of {PROJECTS[row.layout]}, licence {row.licence}", []).append(cells)
    rows = [heading, *(cells for group in groups.values() for cells in group)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(heading))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    lines = [line(heading)]
    for title, group in groups.items():
        lines += ["", title, *map(line, group)]
    own = [
        f"{name}: {shipped.about}; {(FOLDER / shipped.file).stat().st_size / 1e6:.1f} MB, in this package."
        for name, shipped in SHIPPED.items()
    ]
    return "\n".join([*lines, "", *own])
