"""The command line for users' own classes and options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from dino_lightning.cli.command import run_command
from dino_lightning.cli.lightning_cli import Commands, execute, run_subcommand
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
        **options: `trainer_defaults` and `seed_everything_default` of `LightningCLI`.

    Attributes:
        config: the options, as parsed.
        trainer: the Trainer, when it has run.
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
        **options: Any,
    ) -> None:
        self.classes = (model_class, datamodule_class)
        self.options = options
        self.program = f"python {sys.argv[0]}"
        start = partial(Commands.__init__, self)
        if args is not None:
            execute(*_command(args), start=start)
            return
        code = run_command(lambda: run_subcommand(*_command(sys.argv[1:]), start=start, program=self.program))
        if code:
            sys.exit(code)


def _command(args: Sequence[str]) -> tuple[str, list[str]]:
    """The command, and its options."""
    if not args:
        raise UsageError(f"Give a command: {', '.join(Commands.subcommands())}.")
    return args[0], list(args[1:])
