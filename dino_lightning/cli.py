"""The command line: a thin LightningCLI with fixed classes, a folder for each run and errors in one sentence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from dino_lightning.arguments import (
    FROM_DATA,
    UsageError,
    explain_argument_error,
    prepare,
    with_packaged_configs,
)
from dino_lightning.callbacks import KeptMetrics, PredictionImages, RunReport
from dino_lightning.checkpoint import CheckpointError
from dino_lightning.data import CocoDataModule, DataError
from dino_lightning.losses import NonFiniteError
from dino_lightning.module import DINOModule

EXPECTED_ERRORS = (ArgumentError, UsageError, DataError, CheckpointError, NonFiniteError, MisconfigurationException)


class DINOCLI(LightningCLI):
    """`fit`, `validate` and `test` for `DINOModule` on `CocoDataModule`."""

    def __init__(self, args: Sequence[str], run_dir: Path, callbacks: Sequence[Callback] = ()) -> None:
        self.run_dir = run_dir
        self.extra_callbacks = list(callbacks)
        self.report = RunReport(directory=str(run_dir))
        super().__init__(
            DINOModule,
            CocoDataModule,
            args=list(args),
            save_config_kwargs={"overwrite": True},  # a resumed run writes its configuration again
            seed_everything_default=42,
            parser_kwargs={"exit_on_error": False},
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
        parser.add_argument(
            "--compress_gradients",
            type=bool,
            default=False,
            help="With strategy ddp on GPUs: send gradients as bfloat16, half the bytes over the network.",
        )
        for name in FROM_DATA:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args` without the warning about `sys.argv`, which must stay as it is for DDP's other processes."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def _add_instantiators(self) -> None:
        """Keep the stored hyperparameters plain (Lightning would add the names of its own helpers to them)."""

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
        """Settle what depends on the device: precision."""
        trainer = self.config[self.config.subcommand].trainer
        best = default_precision(trainer.accelerator)
        if trainer.precision is None:
            trainer.precision = best
        elif trainer.precision == "bf16-mixed" and best == "16-mixed":
            say("This GPU does not compute in bfloat16: using precision 16-mixed instead of bf16-mixed.")
            trainer.precision = best

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        """The Trainer with this run's loggers, checkpoints and pictures, unless the user has others."""
        checkpoints = self.run_dir / "checkpoints"
        if config.get("strategy") == "ddp":
            # Gradients live in the buffers that are sent: a copy less. No static_graph: which queries are denoised, and
            # so how often a weight is used, differs from batch to batch.
            compress = self.config[self.subcommand].compress_gradients
            config["strategy"] = DDPStrategy(
                gradient_as_bucket_view=True, ddp_comm_hook=bf16_compress_hook if compress else None
            )
        if config.get("logger") in (None, True):
            config["logger"] = [
                CSVLogger(save_dir=str(self.run_dir), name="", version=""),
                TensorBoardLogger(save_dir=str(self.run_dir), name="", version="tensorboard"),
            ]
        config["default_root_dir"] = config.get("default_root_dir") or str(self.run_dir)
        if not sys.stderr.isatty() and config.get("enable_progress_bar") is not False:
            callbacks = [*callbacks, TQDMProgressBar(refresh_rate=10)]
        callbacks = [*callbacks, *self.extra_callbacks]
        callbacks += [self.report, PredictionImages(path=str(self.run_dir / "detections.png"))]
        if config.get("logger"):
            callbacks.append(LearningRateMonitor(logging_interval="step"))
        if config.get("logger") and self.subcommand == "fit" and self.config.fit.ckpt_path:
            callbacks.append(KeptMetrics(path=self.run_dir / "metrics.csv"))
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
        execute(subcommand, args)
    except EXPECTED_ERRORS as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    return 0


def execute(subcommand: str, args: Sequence[str], callbacks: Sequence[Callback] = ()) -> None:
    """Run one subcommand, with more callbacks than its own.

    Raises:
        EXPECTED_ERRORS: bad input; `explain` makes a sentence of it.
    """
    prepared, run_dir = prepare(subcommand, list(args))
    DINOCLI([subcommand, *prepared], run_dir, callbacks)


class _ParseOnly(DINOCLI):
    """Parses and checks a command line, and starts nothing."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Nothing is instantiated."""

    def instantiate_classes(self) -> None:
        """Nothing is instantiated."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse_fit(args: Sequence[str]) -> dict[str, Any]:
    """The options of `fit` as `fit` itself would understand them, in groups `data`, `model` and `trainer`.

    Raises:
        ArgumentError: an option or a configuration file that does not parse; `explain` makes a sentence of it.
    """
    parsed: dict[str, Any] = _ParseOnly(["fit", *with_packaged_configs(args)], Path()).config.fit.as_dict()
    return parsed


def explain(error: BaseException) -> str:
    """What went wrong, in one sentence for the user."""
    return explain_argument_error(str(error)) if isinstance(error, ArgumentError) else original_message(error)


@rank_zero_only
def say(text: str) -> None:
    """Print, on the first process only."""
    print(text, flush=True)


def original_message(error: BaseException) -> str:
    """The message of an error, without the traceback that a loader process wraps round it."""
    message = str(error)
    if "Original Traceback" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return message


def default_precision(accelerator: Any) -> str:
    """Mixed precision on a GPU, bfloat16 where the GPU computes in it; float32 elsewhere."""
    if accelerator in ("cpu", "mps") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "16-mixed"
