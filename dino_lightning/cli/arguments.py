"""What stands before the parser: run folders, configuration files, stored values, sizes for the device."""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dino_lightning.cli.run_options import add_own_options
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import CheckpointError, UsageError
from dino_lightning.files import previous_checkpoint
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.reading import read_checkpoint

RUN_DIR_VARIABLE = "DINO_LIGHTNING_RUN_DIR"  # tells the processes of one run their common folder
RUNS = Path("runs")

FROM_DATA = (
    "num_classes",
    "class_names",
    "category_ids",
    "image_size",
    "max_size",
    "stretch_to",
)  # arguments the model takes over


class CommandParser(argparse.ArgumentParser):
    """Of a command of its own: options are not abbreviated, and a bad one is an error to be caught, not an exit."""

    def __init__(self, command: str, description: str, **more: Any) -> None:
        super().__init__(
            prog=f"python -m dino_lightning {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def error(self, message: str) -> NoReturn:
        """Raise.

        Raises:
            argparse.ArgumentError: always.
        """
        raise argparse.ArgumentError(None, message)


def prepare(subcommand: str, args: list[str]) -> tuple[list[str], Path]:
    """Find the run's folder, and put before the user's arguments what they may leave out.

    Later arguments win over earlier ones, so whatever the user says stands.

    Raises:
        UsageError: `--ckpt_path last` with no run to go on with.
        CheckpointError: `--ckpt_path` names no checkpoint.
    """
    run_dir, args = _take_option(args, "--run_dir")
    checkpoint, args = _take_option(args, "--ckpt_path")
    folder = Path(run_dir) if run_dir else _shared_run_dir()
    if checkpoint == "last":
        folder = folder or newest_run()
        checkpoint = str(folder / "checkpoints" / "last.ckpt")
    if checkpoint is not None:
        checkpoint, content = _whole_checkpoint(Path(checkpoint))
        origin = Path(checkpoint).resolve().parent.parent
        if not _has_option(args, "--config", "-c"):
            args = [*_stored_arguments(origin, content), *args]
        if folder is None and (origin / "config.yaml").is_file():
            folder = origin if subcommand == "fit" else origin / subcommand
        args += ["--ckpt_path", checkpoint]
    elif subcommand == "fit" and not _has_option(args, "--config", "-c", "--help", "-h"):
        args = [*sizes_for_device(), *args]
    args = with_packaged_configs(args)
    folder = folder or RUNS / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    return args, folder


def sizes_for_device() -> list[str]:
    """Image sizes and batch for the published model on this machine's device; said, so that nobody wonders."""
    if torch.cuda.is_available():
        gigabytes = torch.cuda.get_device_properties(0).total_memory / 1e9
        image_size, max_size, batch = (
            (800, 1333, 2) if gigabytes > 20 else (800, 1333, 1) if gigabytes > 14 else (640, 1066, 1)
        )
        device = f"a GPU with {gigabytes:.0f} GB"
    else:
        image_size, max_size, batch, device = (
            480,
            800,
            1,
            "a CPU (hours per epoch; configs/small_cpu.yaml is made for it)",
        )
    rank_zero_info(
        f"No --config given: training the published DINO R50 4-scale model, with images of {image_size} to {max_size} "
        f"pixels and batches of {batch} to suit {device}."
    )
    return [f"--data.image_size={image_size}", f"--data.max_size={max_size}", f"--data.batch_size={batch}"]


def config_path(name: str) -> Path:
    """A configuration file that comes with the package, in a checkout as in an installed wheel.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(name)


def explain_argument_error(message: str) -> str:
    """Add to a parser's complaint about an unknown option the names that exist and come close."""
    message = " ".join(message.split())
    known = known_options()
    for name in re.findall(r"(?:--|[Kk]ey ['\"]|option ['\"])([A-Za-z_][\w.]*)", message):
        if name in known:
            continue
        group = name.rpartition(".")[0]
        siblings = [option for option in known if option.rpartition(".")[0] == group]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
        hint = f" Did you mean --{close[0]}?" if close else ""
        listed = (
            f" Options of {group}: {', '.join(option.rpartition('.')[2] for option in siblings)}." if siblings else ""
        )
        return f"There is no option --{name}.{hint}{listed}"
    return message


def known_options() -> list[str]:
    """The names of all options of `fit`."""
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(CocoDataModule, "data")
    parser.add_lightning_class_args(DINOModule, "model")
    parser.add_class_arguments(Trainer, "trainer")
    add_own_options(parser)
    own = [action.dest for action in parser._actions if action.dest not in ("help", "data", "model", "trainer")]
    return [*own, "config", "seed_everything", "ckpt_path", "data", "model", "trainer"]


def _take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of an option, and the arguments without it."""
    value: str | None = None
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        if arg == name:
            value = next(remaining, None)
            if value is None:
                raise UsageError(f"{name} needs a value.")
        elif arg.startswith(f"{name}="):
            value = arg.partition("=")[2]
        else:
            rest.append(arg)
    return value, rest


def _has_option(args: Sequence[str], *names: str) -> bool:
    return any(arg == name or arg.startswith(f"{name}=") for arg in args for name in names)


def _shared_run_dir() -> Path | None:
    """The folder that the first process of this run chose, in the processes it started."""
    shared = os.environ.get(RUN_DIR_VARIABLE)
    return Path(shared) if shared and "LOCAL_RANK" in os.environ else None


def newest_run() -> Path:
    """The folder of the run in `RUNS` that saved a checkpoint last.

    Raises:
        UsageError: there is none.
    """
    saved = sorted(RUNS.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise UsageError(f"--ckpt_path last: no run in {RUNS}/ has a checkpoint; name the run with --run_dir.")
    return saved[-1].parent.parent


def _whole_checkpoint(path: Path) -> tuple[str, Any]:
    """A checkpoint and its content; where `last.ckpt` is damaged or gone, the one before it.

    Raises:
        CheckpointError: neither can be read; said here in one sentence, where Lightning would stumble over it.
    """
    try:
        return str(path), read_checkpoint(path)
    except CheckpointError as error:
        previous = previous_checkpoint(path)
        if path.name != "last.ckpt" or not previous.is_file():
            raise
        content = read_checkpoint(previous)
        rank_zero_warn(f"{error} Going on from the one before it, {previous}.")
        return str(previous), content


def _stored_arguments(origin: Path, content: Any) -> list[str]:
    """What the run behind a checkpoint was started with: its configuration, or at least the model's sizes."""
    if (origin / "config.yaml").is_file():
        return ["--config", str(origin / "config.yaml")]
    stored = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    return [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in stored.items()
        if name not in FROM_DATA
    ]


def with_packaged_configs(args: Sequence[str]) -> list[str]:
    """Let `--config configs/NAME.yaml` work from any directory for the files that come with the package."""
    return [_packaged_config(previous, arg) for previous, arg in zip(["", *args], args, strict=False)]


def _packaged_config(previous: str, arg: str) -> str:
    option, _, value = arg.partition("=") if arg.startswith("--config=") else (previous, "", arg)
    if option not in ("--config", "-c") or Path(value).is_file():
        return arg
    try:
        found = str(config_path(Path(value).name))
    except FileNotFoundError:
        return arg
    return f"--config={found}" if arg.startswith("--config=") else found
