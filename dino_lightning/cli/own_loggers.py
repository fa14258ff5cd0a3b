"""The loggers that a user asks for, beside those of the run: its own files stay in its folder whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from dino_lightning.cli.run_options import as_list, loggers
from dino_lightning.errors import UsageError

EXPERIMENT = "dino_lightning"  # at MLflow

OF_FIT = ("--overwrite", "--wandb", "--mlflow")


def refuse_options_of_fit(args: Sequence[str]) -> None:
    """Refuse what `validate` and `test` would not heed; in the stored configuration of a training it does no harm.

    Raises:
        UsageError: there is such an option.
    """
    for name in OF_FIT:
        if any(arg.partition("=")[0] == name for arg in args):
            raise UsageError(f"{name} is an option of fit alone.")


def all_loggers(run_dir: Path, given: Any, options: Any, *, fitting: bool) -> list[Logger] | bool:
    """What the Trainer logs to.

    The run's own come first: to Lightning, the folder of the first is the folder of the run.

    Args:
        run_dir: of this run.
        given: `trainer.logger`: none, true, false, one or several; with false, nothing is logged.
        options: of the subcommand, as parsed.
        fitting: whether it is `fit`; `--wandb` and `--mlflow` are about training.

    Raises:
        UsageError: a package is not installed, or a logger refuses its options.
    """
    wanted = {"wandb": _wandb, "mlflow": _mlflow} if fitting else {}
    asked_for = {name: make for name, make in wanted.items() if options.get(name)}
    if given is False:
        if asked_for:
            raise UsageError(f"--{next(iter(asked_for))} logs, and --trainer.logger false does not: leave out one.")
        return False
    more = [] if given is True else as_list(given)
    return [*loggers(run_dir), *more, *(make(options[name], run_dir) for name, make in asked_for.items())]


def _wandb(project: str, run_dir: Path) -> Logger:
    """W&B, whose own folder lies in the run's. The key comes from `wandb login` or WANDB_API_KEY."""
    try:
        return WandbLogger(project=project, name=run_dir.name, save_dir=str(run_dir))
    except ModuleNotFoundError as error:
        raise _missing("wandb") from error


def _mlflow(uri: str, run_dir: Path) -> Logger:
    """MLflow at a server or in a file. A token comes from MLFLOW_TRACKING_TOKEN."""
    try:
        return MLFlowLogger(experiment_name=EXPERIMENT, run_name=run_dir.name, tracking_uri=uri)
    except ModuleNotFoundError as error:
        raise _missing("mlflow") from error
    except Exception as error:  # mlflow has its own, which cannot be imported without it
        if not type(error).__module__.startswith("mlflow"):
            raise
        raise UsageError(f"--mlflow {uri}: {' '.join(str(error).split())}") from error


def _missing(name: str) -> UsageError:
    return UsageError(f"--{name} needs the package {name}, which is not installed: python -m pip install {name}")
