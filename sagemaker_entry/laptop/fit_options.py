"""The options of `fit` that go along with `launch`, and those that a job sets itself, each with the reason."""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any

from dino_lightning.cli.command import no_such_option
from dino_lightning.console import lacks_secrets, without_secrets
from dino_lightning.data.class_paths import class_paths
from dino_lightning.training.option_checks import flat
from sagemaker_entry.protocol.problem import Problem

GROUPS = ("--data.", "--model.", "--trainer.", "--optimizer.", "--lr_scheduler.")
GO_ALONG = (
    "--seed_everything", "--compress_gradients", "--save_every_minutes", "--save_every_steps", "--ema_decay",
    "--ema_tau", "--ema_evaluate", "--best_by", "--early_stopping_patience", "--auto_batch_size", "--optimizer",
    "--lr_scheduler", "--float32_matmul_precision",
)  # fmt: skip
_FOR_EVALUATIONS = "it belongs to validate and test; `fetch` the model and evaluate it on your machine"
_BY_OPTIONS = "write its options one by one, such as {}.{}=..., or in the configuration file"
_BY_GPUS = "the job sets it by the GPUs of its machines; choose them with --gpus, --instance-type and --instance-count"
# Option -> why it does not go along.
REFUSED = {
    "--run_dir": "a job keeps its run folder in S3, and `fetch` brings the model from there",
    "--overwrite": "each launch has a run folder of its own, so there is nothing to overwrite",
    "--ckpt_path": "`resume JOB` continues a job from its last checkpoint; --model.weights=FILE starts from weights",
    "--weights_only": "it is about --ckpt_path, which a job sets itself",
    "--wandb": "a job has no login for Weights & Biases, and anyone who may describe the job could read a key",
    "--mlflow": "launch has an option --mlflow of its own, for the ARN of a tracking server of SageMaker",
    "--report": _FOR_EVALUATIONS,
    "--against": _FOR_EVALUATIONS,
    "--model": _BY_OPTIONS.format("--model", "lr"),
    "--trainer": _BY_OPTIONS.format("--trainer", "max_epochs"),
    "--trainer.accelerator": _BY_GPUS,
    "--trainer.strategy": _BY_GPUS,
    "--trainer.num_nodes": _BY_GPUS,
    "--trainer.enable_progress_bar": "a job prints lines that `attach` reads instead of a bar",
    "--trainer.default_root_dir": "a job keeps its run folder in S3",
    "--trainer.fast_dev_run": "such a run leaves no model; --trial measures a job before you pay for all of it",
}
PACKAGES = ("torch", "torchvision", "torchmetrics", "lightning", "dino_lightning")  # those that every job has


def fit_arguments(given: Sequence[str], launch_options: Sequence[str]) -> list[str]:
    """The arguments that `launch` does not know as options of `fit`, each as one word --NAME=VALUE.

    As in `fit`, every option has a value.

    Args:
        given: the arguments, in their order; a value may be a word of its own.
        launch_options: the names of the options of `launch`, for the closest name to a wrong one.

    Raises:
        argparse.ArgumentError: an option that neither has, that a job sets itself, or that lacks its value.
    """
    joined: list[str] = []
    for word in given:
        name = word.partition("=")[0]
        if joined and "=" not in joined[-1] and not _is_option(word):
            joined[-1] += f"={word}"
            continue
        if joined:
            _check_value(joined[-1])
        if name in REFUSED:
            raise ArgumentError(None, f"{name} does not go along with launch: {REFUSED[name]}.")
        if name not in GO_ALONG and not name.startswith(GROUPS):
            hint = no_such_option(word, [*launch_options, *GO_ALONG])
            groups = ", ".join(f"{group}NAME" for group in GROUPS)
            raise ArgumentError(None, f"{hint} Further options of fit: {groups}.")
        joined.append(word)
    if joined:
        _check_value(joined[-1])
    return joined


def _check_value(option: str) -> None:
    if "=" not in option:
        raise ArgumentError(None, f"{option} needs a value: {option}=VALUE.")


def _is_option(word: str) -> bool:
    """Whether a word names an option; a negative number is a value."""
    return word.startswith("-") and not word[1:2].isdigit() and not word.startswith("-.")


def refuse_for_a_job(options: Mapping[str, Any]) -> None:
    """Refuse what a configuration file sets for the laptop alone, or what leaves a paid job without a model.

    Args:
        options: of `fit`, as parsed.

    Raises:
        Problem: there is such an option.
    """
    for name in ("ckpt_path", "wandb", "mlflow"):
        if options.get(name) is not None:
            raise Problem(f"{name} is set in the configuration, but does not go along: {REFUSED[f'--{name}']}.")
    trainer = options["trainer"]
    if trainer["fast_dev_run"]:
        raise Problem(f"trainer.fast_dev_run does not go along: {REFUSED['--trainer.fast_dev_run']}.")
    if trainer["enable_checkpointing"] is False or trainer["barebones"]:
        raise Problem("Without checkpoints a job leaves no model: remove enable_checkpointing or barebones of trainer.")
    for name, value in {
        **{name: options.get(name) for name in ("optimizer", "lr_scheduler")},
        **{f"trainer.{name}": trainer[name] for name in ("callbacks", "logger", "plugins", "profiler")},
    }.items():
        for path in class_paths(value):
            if "." in path and path.partition(".")[0] not in PACKAGES:
                raise Problem(
                    f"--{name}: {path} is of a package that the job does not have; it has {', '.join(PACKAGES)}."
                )


def refuse_secrets(options: Mapping[str, Any]) -> None:
    """Refuse passwords and signatures, which everyone who may describe the job would read in its parameters.

    Args:
        options: of `fit`, as parsed.

    Raises:
        Problem: an address has some.
    """
    for name, value in flat(options).items():
        hidden = without_secrets(value)
        if hidden != value or lacks_secrets(value):
            raise Problem(
                f"--{name} {hidden}: everyone who may look at the job would see the password or query of this address; "
                "put the file into S3 and give s3://BUCKET/FILE, which the job reads with its role, or give a file of "
                "this machine, which is uploaded."
            )
