"""What is settled before `fit`, `validate` and `test` are parsed: run folder, checkpoint, configuration, sizes."""

from __future__ import annotations

import datetime
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from dino_lightning.cli.checkpoints import LAST, RUNS, checkpoint_to_resume, model_file, read_whole_checkpoint
from dino_lightning.cli.config_files import with_packaged_configs
from dino_lightning.cli.run_options import add_own_options
from dino_lightning.console import say
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import UsageError
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.zoo import needed_options

RUN_DIR_VARIABLE = "DINO_LIGHTNING_RUN_DIR"  # tells the processes of one run their common folder

DEFAULT_SEED = 42
FROM_DATA = (
    "num_classes",
    "class_names",
    "category_ids",
    "image_size",
    "max_size",
    "stretch_to",
)  # arguments the model takes over


def prepare(subcommand: str, args: list[str]) -> tuple[list[str], Path]:
    """Find the run's folder and checkpoint, and put before the user's arguments what they may leave out.

    Later arguments win over earlier ones, so whatever the user says wins.

    Args:
        subcommand: `fit`, `validate` or `test`.
        args: its options.

    Returns:
        The options for the parser, and the folder of the run.

    Raises:
        UsageError: `--ckpt_path last` without any run.
        CheckpointError: `--ckpt_path` names no checkpoint.
    """
    run_dir, args = _take_option(args, "--run_dir")
    checkpoint, args = _take_option(args, "--ckpt_path")
    folder = Path(run_dir) if run_dir else _shared_run_dir()
    if checkpoint is not None:
        if subcommand == "fit":
            wanted = checkpoint_to_resume(checkpoint, folder)
        else:
            wanted = model_file(folder if checkpoint == LAST and folder is not None else checkpoint)
        path, content = read_whole_checkpoint(wanted)
        origin = path.resolve().parent.parent
        if not _has_option(args, "--config", "-c"):
            args = [*_stored_arguments(origin, content), *args]
        if checkpoint == LAST and folder is None and subcommand == "fit":
            folder = path.parent.parent
        if folder is None and (origin / "config.yaml").is_file():
            folder = origin if subcommand == "fit" else origin / subcommand
        args += ["--ckpt_path", str(path)]
    elif subcommand == "fit" and not _has_option(args, "--config", "-c", "--help", "-h"):
        args = [*sizes_for_device(), *args]
    args = with_options_of_weights(with_packaged_configs(args))
    folder = folder or RUNS / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    return args, folder


def with_options_of_weights(args: Sequence[str]) -> list[str]:
    """The options that weights of a name need, put before those of the user, which win over them."""
    place: str | None = None
    for previous, arg in zip(["", *args], args, strict=False):
        name, equals, value = arg.partition("=")
        if not equals:
            name, value = previous, arg
        if name == "--model.weights":
            place = value
        elif name in ("--config", "-c"):
            place = _weights_in(Path(value), place)
    needed = needed_options(place)
    return [*_model_options(needed), *args]


def _weights_in(config: Path, before: str | None) -> str | None:
    """`model.weights` of a configuration file; what it was before where the file does not say. The parser judges it."""
    try:
        model = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("model") or {}
        found = model.get("weights", before)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError):
        return before
    return found if isinstance(found, str) else None


def sizes_for_device() -> list[str]:
    """Options for image sizes and batch that suit the published model and this machine's device; printed as well."""
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
    say(
        f"No --config given: training the published DINO R50 4-scale model, with images of {image_size} to {max_size} "
        f"pixels and batches of {batch} to suit {device}."
    )
    return [f"--data.image_size={image_size}", f"--data.max_size={max_size}", f"--data.batch_size={batch}"]


def explain_argument_error(message: str) -> str:
    """The parser's complaint in one sentence; about an unknown option, with the names that exist and come close."""
    message = " ".join(message.split())
    if required := re.search(r"arguments are required: (?:\w+\.)?(data\.root)$", message):
        return f"--{required[1]} is needed: the folder of the dataset."
    if absent := re.fullmatch(r'Parser key "config": File does not exist: (.*)', message):
        return f"--config: {absent[1]} does not exist."
    key = re.match(r'Parser key "([\w.]+)": ', message)
    value = re.search(r".*(?:Got value|Given value): (.*)$", message)  # the last is the whole one
    kinds = " or ".join(
        dict.fromkeys(_kind(name) for name in re.findall(r"<class '(\w+)'>", message.partition("Given value type")[0]))
    )
    if key and value and kinds:
        return f"--{key[1]} {value[1]}: this must be {kinds}."
    known = known_options()
    for name in re.findall(r"(?:--|[Kk]ey ['\"]|option ['\"])([A-Za-z_][\w.]*)", message):
        if name not in known:
            group = name.rpartition(".")[0]
            siblings = [option for option in known if option.rpartition(".")[0] == group]
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f" Did you mean --{close[0]}?" if close else ""
            names = ", ".join(option.rpartition(".")[2] for option in siblings)
            listed = f" Options of {group}: {names}." if group and siblings else f" Options: {names}." if names else ""
            return f"There is no option --{name}.{hint}{listed}"
    return message


def _kind(name: str) -> str:
    """A Python type in words."""
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
    words |= {"list": "a list", "dict": "a mapping"}
    return words.get(name, name)


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


def _stored_arguments(origin: Path, content: Any) -> list[str]:
    """What the run behind a checkpoint was started with: its configuration, or at least the model's sizes."""
    if (origin / "config.yaml").is_file():
        return ["--config", str(origin / "config.yaml")]
    stored = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    return [
        *_data_options(stored),
        *_model_options({name: value for name, value in stored.items() if name not in FROM_DATA}),
    ]


def _data_options(stored: Mapping[str, Any]) -> list[str]:
    """The sizes of images that a model was trained on, which evaluation has to have, too."""
    if stored.get("stretch_to") is not None:
        return [f"--data.fixed_size={stored['stretch_to']}", "--data.fixed_size_mode=stretch"]
    names = ("image_size", "max_size")
    return [f"--data.{name}={stored[name]}" for name in names if stored.get(name) is not None]


def _model_options(values: Mapping[str, Any]) -> list[str]:
    return [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    ]
