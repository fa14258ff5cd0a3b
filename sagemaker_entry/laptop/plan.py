"""The plan of a job: instances, estimated time and cost, and limits, before any money is spent."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from dino_lightning.cli.command import capitalized
from dino_lightning.console import WHOLE_WORDS
from sagemaker_entry.laptop.compute import Compute
from sagemaker_entry.laptop.estimate import (
    HOUR,
    SHARES,
    START_SECONDS,
    TERAFLOPS,
    TRAINING_FACTOR,
    UNKNOWN_TERAFLOPS,
    Work,
)
from sagemaker_entry.protocol.instances import PRICES_DATE, PRICES_SOURCE, SPOT_DISCOUNT
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.trial import Measured

MAX_RUN_LIMIT = 5 * 24 * 3600  # SageMaker's default limit
COLUMNS = 80  # of the plan and the paragraphs below it
NO_BREAK = "\xa0"  # a space at which no line is broken
PRICE_UNKNOWN = "price unknown without an account that may ask for it (pricing:GetProducts)"


@dataclass(frozen=True)
class Limits:
    """How long the job may run, and its maximum cost.

    Attributes:
        max_run: seconds, after which SageMaker stops the job.
        max_wait: seconds including the wait for spot instances; None on demand.
        max_cost: the on-demand price of `max_run`, in dollars; None where the price is not known.
    """

    max_run: int
    max_wait: int | None
    max_cost: float | None

    def __str__(self) -> str:
        time = f"{self.max_run / HOUR:.1f} hours" if self.max_run >= 2 * HOUR else f"{self.max_run / 60:.0f} minutes"
        cost = PRICE_UNKNOWN if self.max_cost is None else f"${self.max_cost:,.2f} on demand"
        return f"{time}, then it is stopped: {cost}"


def choose_limits(
    hours: tuple[float, float, float],
    compute: Compute,
    *,
    max_run_hours: float | None,
    max_cost: float | None,
    spot: bool,
    max_wait_hours: float | None,
) -> Limits:
    """The user's limits, by default the worst estimate plus 25 %; never above the cost cap.

    Raises:
        Problem: the limits leave no time to train, or contradict each other; or the price for a cost cap is not known.
    """
    seconds = HOUR * (max_run_hours if max_run_hours is not None else math.ceil(hours[2] * 1.25))
    if max_cost is not None:
        if compute.price is None:
            raise Problem(
                f"--max-cost cannot be kept: the price of {compute.instance_type} is not known here; allow "
                "pricing:GetProducts (docs/sagemaker.md) or give --max-run-hours instead."
            )
        seconds = min(seconds, max_cost / compute.price * HOUR)
    max_run = int(min(seconds, MAX_RUN_LIMIT))
    if max_run < 2 * START_SECONDS:
        raise Problem(
            f"The limits leave {max_run / 60:.0f} minutes, which is over before training begins; raise --max-cost or "
            "--max-run-hours."
        )
    waiting = HOUR * (max_wait_hours if max_wait_hours is not None else max_run / HOUR + 24)
    if spot and waiting < max_run:
        raise Problem("--max-wait-hours counts the running time as well, so it must not be below --max-run-hours.")
    cost = None if compute.price is None else max_run / HOUR * compute.price
    return Limits(max_run, int(waiting) if spot else None, cost)


def about(dollars: float) -> str:
    """Estimated dollars without a precision that they do not have: minutes of start and shutdown are billed, too."""
    step = 0.1 if dollars < 3 else 0.5 if dollars < 10 else 1 if dollars < 100 else 10
    rounded = max(step, round(dollars / step) * step)
    return f"${rounded:,.0f}" if rounded == round(rounded) else f"${rounded:,.2f}"


def _row(name: str, value: str, width: int) -> str:
    """A row of the plan in lines of `COLUMNS`, below each other; addresses and commands stay whole."""
    first = f"  {name:<{width}}  "
    whole = re.sub("`[^`]+`", lambda command: command[0].replace(" ", NO_BREAK), value)
    lines = textwrap.fill(whole, COLUMNS, initial_indent=first, subsequent_indent=" " * len(first), **WHOLE_WORDS)
    return lines.replace(NO_BREAK, " ")


@dataclass(frozen=True)
class Plan:
    """All that is decided before the upload.

    Attributes:
        compute: the instances.
        work: the size of the training.
        hours: hours of the whole training, measured or estimated (best, likely, worst).
        limits: maximum time and cost of the job.
        spot: whether to use spot instances.
        image: the container image.
        places: where the weights come from, and S3 addresses, by name.
        price_source: the source of the price.
        measured: what a trial of this training on these instances has measured; None for an estimate.
        trial: what the job runs instead of the whole training, in words; None for the whole.
        cheaper: a cheaper choice of instances, in words, where there is one.
        kept: whether the instances wait for a next job, which those on spot do not.
    """

    compute: Compute
    work: Work
    hours: tuple[float, float, float]
    limits: Limits
    spot: bool
    image: str
    places: dict[str, str]
    price_source: str = f"{PRICES_SOURCE} (table of {PRICES_DATE})"
    measured: Measured | None = None
    trial: str | None = None
    cheaper: str | None = None
    kept: bool = False

    def table(self) -> str:
        """The plan as text for the terminal."""
        compute, work = self.compute, self.work
        amount = work.on(compute.gpus)
        price = PRICE_UNKNOWN if compute.price is None else f"${compute.price:.2f} an hour together"
        rows = [
            ("instances", f"{compute.count} x {compute.instance_type}, {price}"),
            (
                "GPUs",
                f"{compute.gpus} x {compute.instance.gpu} with {compute.instance.gpu_memory} GB, one process each",
            ),
            ("data", f"{work.train_images:,} training images, {amount.val_images:,} validation images"),
            ("global batch", self._batch()),
            ("steps", self._steps()),
            ("image", self.image),
            *self.places.items(),
            *self.costs(),
        ]
        if self.cheaper is not None:
            rows.append(("cheaper", self.cheaper))
        if self.trial is not None:
            rows.append(("this trial", f"{self.trial}; at most {self.limits}"))
        else:
            rows.append(("at most", str(self.limits)))
        width = max(len(name) for name, _ in rows)
        lines = [_row(name, value, width) for name, value in rows]
        return "\n".join(["Plan", *lines, "", *self.explanation(), *(f"NOTE: {note}" for note in self._notes())])

    def costs(self) -> list[tuple[str, str]]:
        """Time and price of the whole training, as rows of the table."""
        best, likely, worst = self.hours
        early = self.work.length.ends_early
        time = f"about {likely:.1f} hours ({best:.1f} to {worst:.1f})"
        rows = [("time", time if early is None else f"at most {time}: {early} may end it sooner")]
        if self.compute.price is None:
            return [*rows, ("on demand", PRICE_UNKNOWN)]
        least, cost, highest = (hours * self.compute.price for hours in self.hours)
        low, high = (about(cost * (1 - discount)) for discount in reversed(SPOT_DISCOUNT))
        how = "--spot in place of --keep-alive" if self.kept else "add --spot"
        return [
            *rows,
            ("on demand", f"about {about(cost)} ({about(least)} to {about(highest)})"),
            ("on spot", f"about {low} to {high}, with interruptions{' <- chosen' if self.spot else '; ' + how}"),
        ]

    def _batch(self) -> str:
        length, gpus = self.work.length, self.compute.gpus
        size = self.work.on(gpus).batch_size
        if length.auto_batch_size is not None:
            return f"{size * gpus} (--auto_batch_size: as many at once on each GPU as fit, the rest accumulated)"
        times = length.accumulate_grad_batches
        accumulated = f", {times} batches accumulated" if times > 1 else ""
        return f"{size * gpus * times} ({size} on each GPU{accumulated})"

    def _steps(self) -> str:
        length, amount = self.work.length, self.work.on(self.compute.gpus)
        per_epoch = math.ceil(amount.batches / length.accumulate_grad_batches)
        text = f"{per_epoch:,} x {amount.epochs} epochs = {per_epoch * amount.epochs:,}"
        if amount.steps < per_epoch * amount.epochs:
            text = f"{amount.steps:,} (trainer.max_steps), {per_epoch:,} in an epoch"
        if length.auto_batch_size is not None:
            text = f"about {text}, by the batch that fits into memory"
        return f"{text}, {amount.evaluations} evaluations"

    def _notes(self) -> Sequence[str]:
        """What the user may not expect."""
        if self.work.on(self.compute.gpus).evaluations:
            return self.compute.notes
        none = (
            "The run ends without an evaluation, so the job leaves no model, but its last checkpoint in S3. More "
            "epochs or steps, or a smaller trainer.check_val_every_n_epoch, give one."
        )
        return (*self.compute.notes, none)

    def result_of_trial(self) -> list[str]:
        """What the last trial has measured, and what the whole training takes and costs, as lines of text."""
        if self.measured is None:
            return ["The trial's measurements are not in S3; its log has them."]
        costs = (f"  {name:<10} {text}" for name, text in self.costs())
        lines = (f"  {line}" for line in self.measured.lines())
        return [capitalized(self.measured.origin()), *lines, "The whole training", *costs]

    def explanation(self) -> Sequence[str]:
        """How the time and the prices were obtained, as lines of text."""
        instance = self.compute.instance
        prices = [f"Prices: {self.price_source}."] if self.compute.price is not None else []
        if self.measured is not None:
            time = f"The time follows from what a trial measured: {self.measured.origin()}."
        else:
            peak = TERAFLOPS.get(instance.gpu, UNKNOWN_TERAFLOPS)
            shares = " / ".join(f"{share:.0%}" for share in SHARES)
            time = (
                "The time is an ESTIMATE, not a measurement (best / likely / worst): "
                f"{self.work.teraflops * TRAINING_FACTOR:.2f} teraflop of training per image at {shares} of the "
                f"{instance.gpu}'s {peak:.0f} (from data sheets), gradients between hosts at {instance.network:g} "
                f"Gb/s, the evaluations, and {START_SECONDS / 60:.0f} minutes to start. A few dozen steps on the real "
                "instances measure it: --trial."
            )
        wrap = textwrap.TextWrapper(COLUMNS, "  ", "  ", **WHOLE_WORDS).wrap
        return [*wrap(time), *(line for text in prices for line in wrap(text)), ""]
