"""The command line for users' own classes and options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dino_lightning.cli.by_hand import RunTrainer, prepare_by_hand
from dino_lightning.cli.command import run_command
from dino_lightning.cli.lightning_cli import Commands
from dino_lightning.cli.quiet import quiet
from dino_lightning.cli.running import execute, run_subcommand
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import UsageError
from dino_lightning.training.module import DINOModule


class DINOCLI(Commands):
    """A `LightningCLI` with the options, folders and reports of `python -m dino_lightning fit`, `validate` and `test`.

    Subclasses add options in `add_arguments_to_parser` and act in `before_fit`, `after_fit` and the other methods of
    `LightningCLI`; in those that are defined here, they call `super()`.

    Args:
        model_class: `DINOModule` or a subclass.
        datamodule_class: `CocoDataModule` or a subclass.
        args: a command and its options; by default those that the script was started with. Then what the user can
            correct ends the script with one sentence and an exit code; otherwise it is raised.
        run: false to make model, data module and Trainer of options without a command, and run nothing: that is for
            `cli.trainer.fit(cli.model, datamodule=cli.datamodule)`, and no folder or file is made before. `before_fit`
            and `after_fit` are not called, and what a command prints at the end is not printed. `--ckpt_path` is no
            option then: a checkpoint is given to the Trainer, and the run has a folder of its own.
        **options: `trainer_defaults` and `seed_everything_default` of `LightningCLI`.

    Attributes:
        config: the options, as parsed.
        trainer: the Trainer, when it has run, or is made.
        model: the module.
        datamodule: the data module.

    Raises:
        UserError, ArgumentError, MisconfigurationException: bad input, where `args` are given.
    """

    def __init__(
        self,
        model_class: type[DINOModule] = DINOModule,
        datamodule_class: type[CocoDataModule] = CocoDataModule,
        *,
        args: Sequence[str] | None = None,
        run: bool = True,
        **options: Any,
    ) -> None:
        self.classes = (model_class, datamodule_class)
        self.options = options
        self.program = f"python {sys.argv[0]}"
        start = partial(Commands.__init__, self)
        if not run:
            self.options = {**options, "run": False, "trainer_class": RunTrainer}
            if args is None:
                _exit_if_failed(run_command(lambda: self._make(sys.argv[1:])))
            else:
                self._make(args)
            return
        if args is not None:
            execute(*_command(args), start=start)
            return
        given = sys.argv[1:]
        _exit_if_failed(run_command(lambda: run_subcommand(*_command(given), start=start, program=self.program)))

    def _make(self, args: Sequence[str]) -> int:
        """Make model, data module and Trainer; returns the exit code."""
        with quiet("fit"):
            Commands.__init__(self, *prepare_by_hand(args, list(self.subcommands())))
        assert isinstance(self.trainer, RunTrainer)
        self.trainer.run_dir = self.run_dir
        return 0


def _exit_if_failed(code: int) -> None:
    if code:
        sys.exit(code)


def _command(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command, and its options."""
    if not args:
        raise UsageError(f"Give a command: {', '.join(Commands.subcommands())}.")
    return args[0], list(args[1:])
