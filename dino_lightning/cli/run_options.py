"""What a run of the command line adds to the Trainer: its loggers, checkpoints and callbacks, in the run's folder."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from dino_lightning.callbacks import (
    EMA,
    AutoBatchSize,
    BestCheckpoint,
    DeviceSettings,
    EarlyStop,
    GracefulCheckpoint,
    LearningCurves,
    MetricsCsvResume,
    PredictionImages,
    Progress,
    RunRecord,
    WatchProcesses,
)
from dino_lightning.callbacks.best import check_metric
from dino_lightning.callbacks.device_settings import MatmulPrecision, may_benchmark
from dino_lightning.callbacks.run_loggers import MetricsCsv, TensorBoardIfPossible


def ddp_strategy(model: nn.Module, *, compress_gradients: bool) -> DDPStrategy:
    """DDP whose gradients live in the buffers that are sent: a copy less.

    No static_graph: which queries are denoised, and so how often a weight is used, differs from batch to batch. Buffers
    are sent in every step only where they change, as the running averages of batch norms do: they are equal at the
    start, and what is kept of frozen norms would have to be computed again.

    Args:
        model: that trains.
        compress_gradients: send gradients as bfloat16.
    """
    arguments = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"  # before torch 2.14
    buffers: dict[str, Any] = {name: any(isinstance(module, _BatchNorm) for module in model.modules())}
    hook = bf16_compress_hook if compress_gradients else None
    return DDPStrategy(gradient_as_bucket_view=True, ddp_comm_hook=hook, **buffers)


def loggers(run_dir: Path) -> list[Logger]:
    """CSV, written at once for a run may be killed at any moment, and TensorBoard."""
    return [
        MetricsCsv(save_dir=str(run_dir), name="", version="", flush_logs_every_n_steps=1),
        TensorBoardIfPossible(save_dir=str(run_dir), name="", version="tensorboard"),
    ]


def run_callbacks(
    config: Mapping[str, Any],
    options: Any,
    run_dir: Path,
    *,
    fitting: bool,
    resuming: bool,
    stop_flag: Path | None,
    given: Sequence[Callback],
    extra: Sequence[Callback],
    report: LearningCurves,
) -> list[Callback]:
    """The callbacks of a run, in their order, beside those of `trainer.callbacks`.

    Args:
        config: arguments of the Trainer; the user's own callbacks are among them.
        options: of the subcommand, as parsed.
        run_dir: of this run.
        fitting: whether it is `fit`.
        resuming: whether the run in this folder is continued.
        stop_flag: a file that asks to save and stop as soon as it exists.
        given: Lightning's own of the command line.
        extra: of whoever started the run.
        report: draws the learning curves.
    """
    # the watch first: from here on a process that dies must not be waited for
    callbacks: list[Callback] = [WatchProcesses(), *given]
    own_bar = any(isinstance(callback, ProgressBar) for callback in as_list(config.get("callbacks")))
    if config.get("enable_progress_bar") is not False and not own_bar:
        callbacks.append(Progress())
    callbacks += [*extra, *asked_for(options, fitting=fitting)]
    if fitting:
        chosen = options.float32_matmul_precision
        callbacks.append(DeviceSettings(float32_matmul_precision=chosen, benchmark=may_benchmark(options)))
    callbacks += [report, PredictionImages(path=str(run_dir / "detections.png"))]
    if config.get("logger"):
        callbacks.append(LearningRateMonitor(logging_interval="step"))
        if fitting:
            callbacks.append(kept_metrics(run_dir, resuming=resuming))
    if config.get("enable_checkpointing") is not False and not config.get("fast_dev_run"):
        callbacks += checkpoints_and_record(run_dir, options, stop_flag)
    return callbacks


def asked_for(options: Any, *, fitting: bool) -> list[Callback]:
    """The callbacks behind options of our own.

    Args:
        options: of the subcommand, as parsed.
        fitting: whether it is `fit`.
    """
    callbacks: list[Callback] = []
    if options.auto_batch_size and fitting:
        callbacks.append(AutoBatchSize(global_batch=int(options.auto_batch_size), checkpoint=options.get("ckpt_path")))
    by_recipe = options.ema_decay is None and options.model.recipe != "published"
    if options.ema_decay or by_recipe:
        callbacks.append(EMA(decay=options.ema_decay, tau=options.ema_tau, evaluate=options.ema_evaluate))
    if options.early_stopping_patience and fitting:
        callbacks.append(EarlyStop(best_by=options.best_by, patience=int(options.early_stopping_patience)))
    return callbacks


def check_metrics(options: Any, class_names: Sequence[str]) -> None:
    """Refuse metrics of validation that do not exist, of `--best_by` and of the user's own callbacks.

    Args:
        options: of the subcommand, as parsed.
        class_names: of the dataset.

    Raises:
        ValueError: there is no such metric.
    """
    check_metric(options.best_by, class_names, "--best_by")
    for callback in as_list(options.trainer.callbacks):
        own = callback.get("init_args") or {}
        if str(own.get("monitor") or "").startswith("val/"):
            kind = str(callback.class_path).rpartition(".")[2]
            check_metric(own["monitor"], class_names, f"{kind} of trainer.callbacks, monitor")


def kept_metrics(run_dir: Path, *, resuming: bool) -> MetricsCsvResume:
    """A copy of metrics.csv beside the checkpoints, which is all that is left of a run in some places."""
    path = run_dir / "metrics.csv"
    return MetricsCsvResume(path=path, copy=run_dir / "checkpoints" / "metrics.csv", resuming=resuming)


def checkpoints_and_record(run_dir: Path, options: Any, stop_flag: Path | None) -> list[Callback]:
    """best.ckpt by the metric of `--best_by`, last.ckpt, and run.json.

    Args:
        run_dir: of this run.
        options: of the subcommand, as parsed.
        stop_flag: a file that asks to save and stop as soon as it exists.
    """
    folder = run_dir / "checkpoints"
    common: dict[str, Any] = {
        "dirpath": str(folder),
        "auto_insert_metric_name": False,
        "enable_version_counter": False,
    }
    return [
        RunRecord(path=run_dir / "run.json"),
        GracefulCheckpoint(
            checkpoint=folder / "last.ckpt",
            every_minutes=options.save_every_minutes,
            every_steps=options.save_every_steps,
            flag=stop_flag,
        ),
        BestCheckpoint(best_by=options.best_by, filename="best", **common),
        # at the end of the epoch, or it would be stale when validation is rarer
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common),
    ]


def as_list(value: Any) -> list[Any]:
    """None, one or several, as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def add_own_options(parser: LightningArgumentParser) -> None:
    """Add them to a parser."""
    # Taken off the command line by `arguments.prepare`; here for --help.
    parser.add_argument(
        "--run_dir",
        type=str | None,
        default=None,
        help="Folder for this run's files; a new one in runs/ by default.",
    )
    parser.add_argument(
        "--overwrite", type=bool, default=False, help="Remove the run that --run_dir holds, and start again."
    )
    parser.add_argument(
        "--wandb", type=str | None, default=None, help="fit: log to this project of Weights & Biases, too."
    )
    parser.add_argument(
        "--mlflow",
        type=str | None,
        default=None,
        help="fit: log to MLflow at this address, too, such as http://localhost:5000 or sqlite:///mlflow.db.",
    )
    parser.add_argument(
        "--compress_gradients",
        type=bool,
        default=False,
        help="With strategy ddp on GPUs: send gradients as bfloat16, half the bytes over the network.",
    )
    parser.add_argument(
        "--float32_matmul_precision",
        type=MatmulPrecision | None,
        default=None,
        help="fit, on CUDA: what float32 products are computed in, as of torch.set_float32_matmul_precision; by "
        "default high (TensorFloat-32) in precision 32-true, unless PyTorch has been set otherwise.",
    )
    parser.add_argument(
        "--save_every_minutes",
        type=float,
        default=10.0,
        help="How often last.ckpt is saved within an epoch; 0: at the end of epochs only.",
    )
    parser.add_argument(
        "--save_every_steps", type=int, default=0, help="The same, by optimizer steps; 0: by the clock only."
    )
    parser.add_argument(
        "--ema_decay",
        type=float | None,
        default=None,
        help="Keep an exponential moving average of the weights with this decay, such as 0.9997; 0: none. "
        "By default none with model.recipe published; otherwise one that reaches back over a fifth of the run.",
    )
    parser.add_argument(
        "--ema_tau", type=float, default=2000.0, help="After how many steps the decay is at 63 percent; 0: at once."
    )
    parser.add_argument(
        "--ema_evaluate",
        type=bool,
        default=True,
        help="Evaluate the averaged weights rather than the raw ones, and let best.ckpt hold them.",
    )
    parser.add_argument(
        "--best_by",
        type=str,
        default="val/AP",
        help="The metric of validation by which best.ckpt is the best: val/AP, val/F1, val/AP50, val/loss and more; "
        "among equals the lowest val/loss decides.",
    )
    parser.add_argument(
        "--early_stopping_patience",
        type=PositiveInt | None,
        default=None,
        help="Stop once so many validations in a row were no better, by best_by, than the best.",
    )
    parser.add_argument(
        "--report", type=bool, default=True, help="validate and test: write a report with plots and images."
    )
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="validate and test: another run to compare with in the report; its folder or its report.json.",
    )
    parser.add_argument(
        "--auto_batch_size",
        type=PositiveInt | None,
        default=None,
        help="Images for each optimizer step, over all processes: data.batch_size becomes the largest that fits "
        "into memory, and trainer.accumulate_grad_batches makes up for the rest.",
    )
