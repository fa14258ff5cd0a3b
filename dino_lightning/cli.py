"""The command line: a thin LightningCLI with fixed classes, a folder for each run and errors in one sentence."""

from __future__ import annotations

import datetime
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from dino_lightning.callbacks import PredictionImages, RunReport
from dino_lightning.checkpoint import CheckpointError, read_checkpoint
from dino_lightning.data import CocoDataModule, DataError
from dino_lightning.losses import NonFiniteError
from dino_lightning.module import DINOModule

RUN_DIR_VARIABLE = "DINO_LIGHTNING_RUN_DIR"  # tells the processes of one run their common folder
RUNS = Path("runs")
LINKED = ("num_classes", "class_names", "category_ids", "image_size", "max_size")


class UsageError(ValueError):
    """A command line that cannot be carried out; the message is one sentence."""


class DINOCLI(LightningCLI):
    """`fit`, `validate` and `test` for `DINOModule` on `CocoDataModule`."""

    def __init__(self, args: Sequence[str], run_dir: Path) -> None:
        self.run_dir = run_dir
        self.report = RunReport(directory=str(run_dir))
        super().__init__(
            DINOModule,
            CocoDataModule,
            args=list(args),
            save_config_kwargs={"overwrite": True},  # a resumed run writes its configuration again
            seed_everything_default=42,
            parser_kwargs={"exit_on_error": False},
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods on offer."""
        return {name: methods for name, methods in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """State each value once: classes and sizes come from the data."""
        # Both are taken off the command line by `prepare`; here they are for --help.
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder for this run's files; a new one in runs/ by default.",
        )
        for name in ("num_classes", "class_names", "category_ids"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for name in ("image_size", "max_size"):
            parser.link_arguments(f"data.{name}", f"model.{name}")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args` without the warning about `sys.argv`, which must stay as it is for DDP's other processes."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Keep the user's values: Lightning would overwrite them with those stored in the checkpoint."""

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; values they refuse are the user's, not a crash."""
        try:
            super().instantiate_classes()
        except (DataError, CheckpointError, MisconfigurationException):
            raise
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on the device: precision."""
        trainer = self.config[self.config.subcommand].trainer
        if trainer.precision is None:
            trainer.precision = default_precision(trainer.accelerator)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        """The Trainer with this run's loggers, checkpoints and pictures, unless the user has others."""
        checkpoints = self.run_dir / "checkpoints"
        if config.get("logger") in (None, True):
            config["logger"] = [
                CSVLogger(save_dir=str(self.run_dir), name="", version=""),
                TensorBoardLogger(save_dir=str(self.run_dir), name="", version="tensorboard"),
            ]
        config["default_root_dir"] = config.get("default_root_dir") or str(self.run_dir)
        if not sys.stderr.isatty() and config.get("enable_progress_bar") is not False:
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=50)]
        callbacks = [*callbacks, self.report, PredictionImages(path=str(self.run_dir / "detections.png"))]
        if config.get("logger"):
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if config.get("enable_checkpointing") is not False and not config.get("fast_dev_run"):
            common: dict[str, Any] = {
                "dirpath": str(checkpoints),
                "auto_insert_metric_name": False,
                "enable_version_counter": False,
            }
            callbacks += [
                ModelCheckpoint(filename="best", monitor="val/AP", mode="max", **common),
                # at the end of the epoch, or it would be stale when validation is rarer
                ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common),
            ]
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Say what is about to be trained on."""
        self._introduce()

    def _introduce(self) -> None:
        data = self.datamodule
        assert isinstance(data, CocoDataModule)
        say(f"{data.summary()}\n\n{data.class_table()}\n")

    def after_fit(self) -> None:
        """Show what came out and where it is."""
        checkpoints = self.run_dir / "checkpoints"
        say(f"\n{self.report.table()}\n")
        places = [
            ("best checkpoint", checkpoints / "best.ckpt"),
            ("last checkpoint", checkpoints / "last.ckpt"),
            ("metrics", self.run_dir / "metrics.csv"),
            ("learning curves", self.report.curves_path),
            ("detections", self.run_dir / "detections.png"),
            ("configuration", self.run_dir / "config.yaml"),
        ]
        for name, path in places:
            if path.exists():
                say(f"{name:<16} {path}")
        if (checkpoints / "best.ckpt").exists():
            say(f"\nLook closer:  python -m dino_lightning validate --ckpt_path {checkpoints / 'best.ckpt'}")
            say(f"Watch losses: tensorboard --logdir {self.run_dir}")

    def after_validate(self) -> None:
        """Show the classes one by one."""
        self._show_classes()

    def after_test(self) -> None:
        """As after validation."""
        self._show_classes()

    def _show_classes(self) -> None:
        assert isinstance(self.model, DINOModule)
        rows = self.model.class_results
        say(f"{'class':<24}{'boxes':>8}{'AP':>8}{'AP50':>8}{'F1':>8}{'precision':>11}{'recall':>8}{'threshold':>11}")
        for row in rows:
            say(
                f"{row.name[:23]:<24}{row.num_boxes:>8}{row.ap:>8.3f}{row.ap50:>8.3f}{row.f1:>8.3f}"
                f"{row.precision:>11.3f}{row.recall:>8.3f}{row.threshold:>11.2f}"
            )


def main(subcommand: str, args: Sequence[str]) -> int:
    """Run one subcommand; bad input ends in one sentence on stderr and a non-zero exit code."""
    try:
        args, run_dir = prepare(subcommand, list(args))
        DINOCLI([subcommand, *args], run_dir)
    except ArgumentError as error:
        print(f"error: {explain_argument_error(str(error))}", file=sys.stderr)
        return 2
    except (UsageError, DataError, CheckpointError, NonFiniteError, MisconfigurationException) as error:
        print(f"error: {original_message(error)}", file=sys.stderr)
        return 1
    return 0


@rank_zero_only
def say(text: str) -> None:
    """Print, on the first process only."""
    print(text, flush=True)


def prepare(subcommand: str, args: list[str]) -> tuple[list[str], Path]:
    """Find the run's folder, and put before the user's arguments what they may leave out.

    Later arguments win over earlier ones, so whatever the user says stands.

    Raises:
        UsageError: `--ckpt_path last` with no run to go on with.
        CheckpointError: `--ckpt_path` names no checkpoint.
    """
    run_dir, args = _take_option(args, "--run_dir")
    checkpoint, args = _take_option(args, "--ckpt_path")
    folder = _shared_run_dir() or (Path(run_dir) if run_dir else None)
    if checkpoint == "last":
        folder = folder or _newest_run()
        checkpoint = str(folder / "checkpoints" / "last.ckpt")
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise CheckpointError(f"Checkpoint {checkpoint} does not exist.")
        origin = Path(checkpoint).resolve().parent.parent
        if not _has_option(args, "--config", "-c"):
            args = [*_stored_arguments(origin, checkpoint), *args]
        if folder is None and (origin / "config.yaml").is_file():
            folder = origin if subcommand == "fit" else origin / subcommand
        args += ["--ckpt_path", checkpoint]
    elif subcommand == "fit" and not _has_option(args, "--config", "-c"):
        args = [*sizes_for_device(), *args]
    args = [_packaged_config(previous, arg) for previous, arg in zip(["", *args], args, strict=False)]
    folder = folder or RUNS / datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    os.environ[RUN_DIR_VARIABLE] = str(folder)
    return args, folder


def default_precision(accelerator: Any) -> str:
    """Mixed precision on a GPU, bfloat16 where the GPU computes in it; float32 elsewhere."""
    if accelerator in ("cpu", "mps") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"


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
    say(
        f"No --config given: training the published DINO R50 4-scale model, with images of {image_size} to {max_size} "
        f"pixels and batches of {batch} to suit {device}."
    )
    return [f"--data.image_size={image_size}", f"--data.max_size={max_size}", f"--data.batch_size={batch}"]


def config_path(name: str) -> Path:
    """A configuration file that comes with the package, in a checkout as in an installed wheel.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    package = Path(__file__).parent
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
    own = [action.dest for action in parser._actions if action.dest not in ("help", "data", "model", "trainer")]
    return [*own, "config", "seed_everything", "run_dir", "ckpt_path", "data", "model", "trainer"]


def original_message(error: BaseException) -> str:
    """The message of an error, without the traceback that a loader process wraps round it."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message


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


def _newest_run() -> Path:
    saved = sorted(RUNS.glob("*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise UsageError(f"--ckpt_path last: no run in {RUNS}/ has a checkpoint; name the run with --run_dir.")
    return saved[-1].parent.parent


def _stored_arguments(origin: Path, checkpoint: str) -> list[str]:
    """What the run behind a checkpoint was started with: its configuration, or at least the model's sizes."""
    if (origin / "config.yaml").is_file():
        return ["--config", str(origin / "config.yaml")]
    content = read_checkpoint(checkpoint)
    stored = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
    return [
        f"--model.{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in stored.items()
        if name not in LINKED
    ]


def _packaged_config(previous: str, arg: str) -> str:
    """Let `--config configs/NAME.yaml` work from any directory for the files that come with the package."""
    option, _, value = arg.partition("=") if arg.startswith("--config=") else (previous, "", arg)
    if option not in ("--config", "-c") or Path(value).is_file():
        return arg
    try:
        found = str(config_path(Path(value).name))
    except FileNotFoundError:
        return arg
    return f"--config={found}" if arg.startswith("--config=") else found
