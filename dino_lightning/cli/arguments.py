"""What is settled before `fit`, `validate` and `test` are parsed: run folder, checkpoint, configuration, sizes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from dino_lightning.cli.checkpoints import LAST, checkpoint_to_resume, model_file, read_whole_checkpoint
from dino_lightning.cli.class_options import explain_class_error, kind
from dino_lightning.cli.config_files import absent_config, with_packaged_configs
from dino_lightning.cli.options_of_weights import place_of_weights, with_options_of_weights
from dino_lightning.cli.run_folder import new_folder, shared_run_dir
from dino_lightning.cli.run_options import add_own_options
from dino_lightning.cli.stored_options import (
    arguments_of_model,
    arguments_of_weights,
    run_folder_of,
    stored_arguments,
)
from dino_lightning.console import lacks_secrets, say
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import UsageError
from dino_lightning.training.module import DINOModule
from dino_lightning.training.option_checks import flat
from dino_lightning.weights.stored import check_checkpoint, check_settings

DEFAULT_SEED = 42
PUBLISHED_EPOCHS = 12  # of the shortest published training (arXiv 2203.03605, table 1)
LENGTHS = tuple(f"--trainer.{name}" for name in ("max_epochs", "max_steps", "max_time"))  # options that end a training


def prepare(subcommand: str, args: list[str], *, make_folder: bool = True) -> tuple[list[str], Path]:
    """Find the run's folder and checkpoint, and put before the user's arguments what they may leave out.

    Later arguments win over earlier ones, so whatever the user says wins.

    Args:
        subcommand: `fit`, `validate` or `test`.
        args: its options.
        make_folder: whether a new folder for the run is made at once.

    Returns:
        The options for the parser, and the folder of the run.

    Raises:
        UsageError: `--ckpt_path last` without any run.
        CheckpointError: `--ckpt_path` names no checkpoint.
    """
    run_dir, args = take_option(args, "--run_dir")
    checkpoint, args = take_option(args, "--ckpt_path")
    folder = Path(run_dir) if run_dir else shared_run_dir()
    if checkpoint is not None:
        if subcommand == "fit":
            wanted = checkpoint_to_resume(checkpoint, folder)
        else:
            wanted = model_file(folder if checkpoint == LAST and folder is not None else checkpoint)
        path, content = read_whole_checkpoint(wanted)
        check_settings(check_checkpoint(content, path)["hyper_parameters"], path, DINOModule)
        origin = run_folder_of(path)
        if not _has_option(args, "--config", "-c"):
            args = [*stored_arguments(subcommand, path, content), *args]
        elif subcommand != "fit":
            args = [*arguments_of_model(content["hyper_parameters"]), *args]
        if checkpoint == LAST and folder is None and subcommand == "fit":
            folder = path.parent.parent
        if folder is None and origin is not None:
            folder = origin if subcommand == "fit" else origin / subcommand
        args += ["--ckpt_path", str(path)]
    elif subcommand == "fit" and not _has_option(args, "--config", "-c", "--help", "-h"):
        args = [*published_recipe(args), *args]
    elif subcommand != "fit" and not _has_option(args, "--help", "-h"):
        args = [*arguments_of_weights(place_of_weights(args)), *args]
    args = with_options_of_weights(with_packaged_configs(args))
    return args, folder or new_folder(make=make_folder)


def refuse_redacted_addresses(options: Mapping[str, Any]) -> None:
    """Refuse addresses from a stored configuration, which lack their secrets, where they are needed.

    Args:
        options: of a subcommand, as parsed; with a checkpoint, none of the model's addresses is needed.

    Raises:
        UsageError: there is one; the message asks for the option.
    """
    for name, value in flat(options).items():
        needless = options.get("ckpt_path") is not None and name.startswith("model.")
        if lacks_secrets(value) and not needless:
            raise UsageError(
                f"--{name} {value}: passwords and queries of addresses are not stored; give --{name} again, with the "
                "whole address."
            )


def published_recipe(args: Sequence[str]) -> list[str]:
    """What `fit` without a configuration takes: the published epochs, sizes that suit this machine's device; printed.

    Args:
        args: the user's options; with one of `LENGTHS` no number of epochs is added.
    """
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
    timed = _has_option(args, *LENGTHS)
    say(
        f"No --config given: the published recipe{'' if timed else f', {PUBLISHED_EPOCHS} epochs'} of DINO R50 4-scale "
        f"where options do not say otherwise, with images of {image_size} to {max_size} pixels and batches of {batch} "
        f"to suit {device}."
    )
    sizes = [f"--data.image_size={image_size}", f"--data.max_size={max_size}", f"--data.batch_size={batch}"]
    return sizes if timed else [*sizes, f"--trainer.max_epochs={PUBLISHED_EPOCHS}"]


def explain_argument_error(message: str) -> str:
    """The parser's complaint in one sentence; about an unknown option, with the names that exist and come close."""
    message = " ".join(message.split())
    if required := re.search(r"arguments are required: (?:\w+\.)?(data\.root)$", message):
        return f"--{required[1]} is needed: the folder of the dataset."
    if absent := re.fullmatch(r'Parser key "config": File does not exist: (.*)', message):
        return absent_config(absent[1].strip("'\""))
    if (about_class := explain_class_error(message)) is not None:
        return about_class
    key = re.match(r'Parser key "([\w.]+)": ', message)
    value = re.search(r".*(?:Got value|Given value): (.*)$", message)  # the last is the whole one
    kinds = " or ".join(
        dict.fromkeys(kind(name) for name in re.findall(r"<class '(\w+)'>", message.partition("Given value type")[0]))
    )
    if key and value and kinds:
        return f"--{key[1]} {value[1]}: this must be {kinds}."
    known = known_options()
    for name in re.findall(r"(?:--|[Kk]ey ['\"]|option ['\"])([A-Za-z_][\w.]*)", message):
        if name not in known:
            group = name.rpartition(".")[0]
            siblings = [option for option in known if option.rpartition(".")[0] == group]
            longer = [option for option in known if option.startswith(name)]  # names are not abbreviated
            close = longer if len(longer) == 1 else difflib.get_close_matches(name, longer or known, n=1, cutoff=0.6)
            hint = f" Did you mean --{close[0]}?" if close else ""
            names = ", ".join(option.rpartition(".")[2] for option in siblings)
            listed = f" Options of {group}: {names}." if group and siblings else f" Options: {names}." if names else ""
            return f"There is no option --{name}.{hint}{listed}"
    return message


def fit_parser() -> LightningArgumentParser:
    """A parser with all options of `fit`, for their names and descriptions; it runs nothing."""
    parser = LightningArgumentParser()
    parser.add_argument("--config", type=str | None, default=None)
    parser.add_argument("--seed_everything", type=bool | int, default=DEFAULT_SEED)
    parser.add_argument("--ckpt_path", type=str | None, default=None)
    add_own_options(parser)
    parser.add_lightning_class_args(CocoDataModule, "data")
    parser.add_lightning_class_args(DINOModule, "model")
    parser.add_lightning_class_args(Trainer, "trainer")
    return parser


def known_options() -> list[str]:
    """The names of all options of `fit`."""
    return [action.dest for action in fit_parser()._actions if action.dest != "help"]


def take_option(args: list[str], name: str) -> tuple[str | None, list[str]]:
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
