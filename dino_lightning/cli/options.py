"""The options of `fit`, `validate` and `test` that are neither Lightning's nor arguments of data, model or Trainer."""

from __future__ import annotations

from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser


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
        "--compress_gradients",
        type=bool,
        default=False,
        help="With strategy ddp on GPUs: send gradients as bfloat16, half the bytes over the network.",
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
        help="Keep an exponential moving average of the weights with this decay, such as 0.9997; 0: none.",
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
        "--early_stopping_patience",
        type=PositiveInt | None,
        default=None,
        help="Stop once val/AP has not improved in so many validations.",
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
