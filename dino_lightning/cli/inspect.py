"""The command `inspect`: the health report of a dataset in the terminal, as JSON and as one HTML page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_lightning.cli.command import PROGRAM, CommandParser, plain_warnings, run_command, writing
from dino_lightning.console import say
from dino_lightning.files import atomic_write

if TYPE_CHECKING:
    from dino_lightning.inspection.checks import Limits

DESCRIPTION = """Read all annotations and decode all images of a dataset, and say what is wrong with them.

All options of fit are understood, --data.root and --config among them; of the model only the number of queries matters.
Exit code: 0 without errors in the dataset, 1 with errors, 2 for a wrong option.
"""


def run(args: Sequence[str]) -> int:
    """Inspect; returns the exit code."""

    def action() -> int:
        parser = CommandParser(
            f"{PROGRAM} inspect",
            DESCRIPTION,
            epilog=f"Example: {PROGRAM} inspect --data.root plans",
        )
        folder = Path("inspection")
        parser.add_argument("--output", type=Path, default=folder, help="folder for health.html and health.json")
        parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
        options, rest = parser.parse_known_args(args)
        from dino_lightning.cli.lightning_cli import parse_fit  # takes seconds to import

        with plain_warnings():
            return _inspect(parse_fit(rest), options.output, strict=options.strict)

    return run_command(action)


def _inspect(fit: Mapping[str, Any], output: Path, *, strict: bool) -> int:
    from dino_lightning.data.read_splits import read_options, split_options
    from dino_lightning.data.splits import resolve_split_files
    from dino_lightning.inspection.inspect import inspect_dataset
    from dino_lightning.inspection.page import as_html
    from dino_lightning.inspection.text import as_json, as_text

    data = fit["data"]
    root = Path(data["root"])
    files = resolve_split_files(root, split_options(data))
    report = inspect_dataset(files, root=root, limits=_limits(data, fit["model"]), options=read_options(data))
    say(as_text(report))
    places = {
        output / "health.html": as_html(report, str(data["root"])),
        output / "health.json": json.dumps(as_json(report), indent=1),
    }
    with writing(output, "--output"):
        for path, content in places.items():
            with atomic_write(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
    say("\nreport   " + "\ndetails  ".join(str(path) for path in places))
    failed = report.count("error") > 0 or (strict and report.count("warning") > 0)
    return 1 if failed else 0


def _limits(data: Mapping[str, Any], model: Mapping[str, Any]) -> Limits:
    """What training and evaluation will do with the dataset, by the options of `fit`."""
    from dino_lightning.inspection.checks import Limits
    from dino_lightning.metrics.backends import MAX_DETECTIONS

    image_size, max_size, fixed_size = data["image_size"], data["max_size"], data["fixed_size"]
    for name, value in (("image_size", image_size), ("max_size", max_size), ("fixed_size", fixed_size)):
        if value is not None and value < 1:
            raise argparse.ArgumentError(None, f"{name} is {value}; it must be at least 1.")
    if fixed_size is not None and data["fixed_size_mode"] == "pad":
        image_size, max_size = min(image_size, fixed_size), min(max_size, fixed_size)
    elif fixed_size is not None:
        image_size = max_size = fixed_size
    return Limits(
        num_queries=model.get("num_queries", Limits.num_queries),
        max_detections=model["max_detections"],
        max_detections_of_class=MAX_DETECTIONS,
        image_size=image_size,
        max_size=max_size,
    )
