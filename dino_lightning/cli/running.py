"""Running `fit`, `validate` or `test`: the folder of the run held, faults of memory explained, stops on request."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from dino_lightning.callbacks import OutOfMemoryReporter, StoppedOnRequest
from dino_lightning.callbacks.rank_watchdog import watch_first_process
from dino_lightning.cli import run_folder
from dino_lightning.cli.arguments import prepare, take_option
from dino_lightning.cli.checkpoints import raise_if_restoring
from dino_lightning.cli.command import PROGRAM, SIGNAL_EXIT_CODE
from dino_lightning.cli.help_pages import asks_for_all
from dino_lightning.cli.lightning_cli import Commands
from dino_lightning.cli.own_loggers import refuse_options_of_fit
from dino_lightning.cli.quiet import quiet
from dino_lightning.console import say
from dino_lightning.errors import OutOfMemory
from dino_lightning.training.memory import is_out_of_memory


def run_subcommand(
    subcommand: str, args: Sequence[str], start: Callable[..., object] = Commands, program: str = PROGRAM
) -> int:
    """Run `fit`, `validate` or `test`; returns the exit code, also of a run that was stopped and saved.

    Args:
        subcommand: `fit`, `validate` or `test`.
        args: its options.
        start: as in `execute`.
        program: what runs this, for the line that says how to resume.

    Raises:
        UserError, ArgumentError, MisconfigurationException: bad input, see `command.expected_errors`.
    """
    try:
        execute(subcommand, args, start=start)
    except StoppedOnRequest as stopped:
        say(
            f"\nStopped at step {stopped.step} on request. Resume with:\n"
            f"    {program} fit --ckpt_path {stopped.checkpoint}"
        )
        # To the first process, an exit code of another would mean that it has failed.
        return 0 if os.environ.get("LOCAL_RANK", "0") != "0" else SIGNAL_EXIT_CODE + stopped.signal_number
    return 0


def execute(
    subcommand: str,
    args: Sequence[str],
    callbacks: Sequence[Callback] = (),
    stop_flag: Path | None = None,
    start: Callable[..., object] = Commands,
) -> None:
    """Run one subcommand, with more callbacks than its own.

    Args:
        subcommand: `fit`, `validate` or `test`.
        args: its options.
        callbacks: what else is to watch it.
        stop_flag: a file that asks to save and stop as soon as it exists.
        start: takes the arguments of `Commands`, and runs.

    Raises:
        UserError, ArgumentError, MisconfigurationException: bad input, see `command.expected_errors`.
        StoppedOnRequest: the run was asked to stop, and its checkpoint is saved.
    """
    with quiet(subcommand):
        _execute(subcommand, args, callbacks, stop_flag, start)


def _execute(
    subcommand: str,
    args: Sequence[str],
    callbacks: Sequence[Callback],
    stop_flag: Path | None,
    start: Callable[..., object],
) -> None:
    watch_first_process()
    overwrite, given = run_folder.take_overwrite(args)
    if asks_for_all(given):
        start([subcommand, "--help"], Path())
        return
    if subcommand != "fit":
        refuse_options_of_fit(args)
    prepared, run_dir = prepare(subcommand, given)
    watch = OutOfMemoryReporter()
    with ExitStack() as held:
        held.callback(run_folder.remove_unused, run_dir)
        if subcommand == "fit":
            run_folder.hold(run_dir, take_option(prepared, "--ckpt_path")[0], held, overwrite=overwrite)
        else:
            run_dir = run_folder.evaluation_folder(run_dir, subcommand)
        held.enter_context(run_folder.shared(run_dir))
        try:
            start([subcommand, *prepared], run_dir, [*callbacks, watch], stop_flag, held)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                raise_if_restoring(error, prepared)
                raise
            raise watch.explained(error) from error
        except Exception as error:
            raise_if_restoring(error, prepared)
            raise
