"""The plan of a job: instances, estimated time and cost, and limits, before any money is spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sagemaker_entry.protocol.instances import (
    DEFAULT_TYPE,
    INSTANCES,
    PRICES_DATE,
    PRICES_SOURCE,
    SPOT_DISCOUNT,
    Instance,
    full_type_name,
)
from sagemaker_entry.protocol.problem import Problem

# Peak dense half-precision teraflops of a GPU, and the fraction of the peak that training reaches: (best, likely,
# worst). The A10G's number is NVIDIA's. The L4 has twice as many on paper, but half of the A10G's memory bandwidth,
# which limits training, so a lower number is used. The fractions are estimates, not yet measured on such a GPU.
TERAFLOPS = {"A10G": 70.0, "L4": 60.0, "T4": 65.0, "V100": 125.0, "L40S": 180.0, "A100": 312.0, "H100": 600.0}
UNKNOWN_TERAFLOPS = 70.0
SHARES = (0.15, 0.08, 0.04)
TRAINING_FACTOR = 3.0  # forward and backward together cost about three forward passes
BYTES_PER_PARAMETER = 4
START_SECONDS = 300.0  # download of image and data, installation, first step
EVALUATION_SECONDS = 15.0  # metrics, images and checkpoint after each evaluation
MAX_RUN_LIMIT = 5 * 24 * 3600  # SageMaker's default limit
HOUR = 3600.0


@dataclass(frozen=True)
class Compute:
    """The instances of a job, all of one type.

    Attributes:
        instance_type: such as "ml.g5.2xlarge".
        count: the number of instances.
        instance: GPUs, memory and price of one instance.
        notes: what the user may not expect, one sentence each.
    """

    instance_type: str
    count: int
    instance: Instance
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """The number of GPUs of all instances together."""
        return self.count * self.instance.gpus

    @property
    def price(self) -> float:
        """Dollars an hour on demand for all instances together."""
        return self.count * self.instance.price


def choose_compute(
    *,
    gpus: int | None,
    instance_type: str | None,
    count: int | None,
    wanted: int,
    known: dict[str, Instance] | None = None,
) -> Compute:
    """Choose the instances for a number of GPUs, with a note for everything that the user may not expect.

    Args:
        gpus: the user's --gpus.
        instance_type: the user's --instance-type.
        count: the user's --instance-count.
        wanted: the GPUs that the configuration is made for, used without --gpus.
        known: the known instance types; `INSTANCES` by default.

    Raises:
        Problem: an unknown instance type, or options that contradict each other.
    """
    known = INSTANCES if known is None else known
    type_name = full_type_name(instance_type or DEFAULT_TYPE)
    instance = known.get(type_name)
    if instance is None:
        raise Problem(
            f"There is no instance type {type_name} with a known number of GPUs; choose one of {', '.join(known)}."
        )
    if (gpus is not None and gpus < 1) or (count is not None and count < 1):
        raise Problem("--gpus and --instance-count must be at least 1.")
    if gpus is not None and count is not None and gpus != count * instance.gpus:
        raise Problem(
            f"--gpus {gpus} and --instance-count {count} contradict each other: {count} x {type_name} "
            f"{_have(count)} {count * instance.gpus} {instance.gpu}; remove one of the two."
        )
    asked = gpus or wanted
    if count is None:
        count = math.ceil(asked / instance.gpus)
    total = count * instance.gpus
    notes: list[str] = []
    if count > 1 and instance.gpus == 1:
        notes.append(
            f"An {type_name} has ONE {instance.gpu}: {total} GPUs are {count} instances, and each of them is billed."
        )
    if total < wanted:
        notes.append(
            f"The configuration is made for {wanted} GPUs, but {count} x {type_name} {_have(count)} only {total}: "
            f"training takes about {wanted / total:g} times as long; --gpus {wanted} gives all of them."
        )
    elif total > asked:
        notes.append(
            f"{count} x {type_name} {_have(count)} {total} GPUs, not {asked}: training uses all, since all are billed."
        )
    if total != wanted:
        notes.append(
            f"The global batch changes from {wanted} to {total} times data.batch_size; change "
            "--data.batch_size or --model.lr if that matters."
        )
    return Compute(type_name, count, instance, tuple(notes))


def _have(count: int) -> str:
    return "have" if count > 1 else "has"


@dataclass(frozen=True)
class Work:
    """The size of the training, from which its time is estimated.

    Attributes:
        train_images: images in an epoch.
        val_images: images in an evaluation.
        epochs: the number of epochs.
        evaluations: the number of evaluations.
        batch_size: images per step and GPU.
        teraflops: 10^12 floating-point operations of a forward pass of one image.
        parameters: trainable parameters, whose gradients the hosts exchange.
    """

    train_images: int
    val_images: int
    epochs: int
    evaluations: int
    batch_size: int
    teraflops: float
    parameters: int

    def steps_per_epoch(self, gpus: int) -> int:
        """Full batches of each process in an epoch; at least one."""
        return max(1, math.ceil(self.train_images / gpus) // self.batch_size)


def estimate_hours(work: Work, compute: Compute) -> tuple[float, float, float]:
    """Estimated billed hours: (best, likely, worst).

    A step costs three forward passes of its batch at a fraction of the GPU's peak, and exchanges 4 bytes for each
    parameter between hosts at the network's baseline bandwidth. In the best case computation hides the exchange, in the
    likely case half of it, in the worst case none. An evaluation is a forward pass of the validation images.
    """
    peak = TERAFLOPS.get(compute.instance.gpu, UNKNOWN_TERAFLOPS)
    between_hosts = 2 * (compute.count - 1) / compute.count  # times that a ring all-reduce sends each byte
    exchange = work.parameters * BYTES_PER_PARAMETER * 8 * between_hosts / (compute.instance.network * 1e9)
    hours = []
    for share, hidden in zip(SHARES, (1.0, 0.5, 0.0), strict=True):
        forward = work.teraflops / (peak * share)  # seconds for one image
        computing = TRAINING_FACTOR * forward * work.batch_size
        step = max(computing, exchange, computing + (1 - hidden) * exchange)
        evaluation = math.ceil(work.val_images / compute.gpus) * forward + EVALUATION_SECONDS
        training = work.epochs * work.steps_per_epoch(compute.gpus) * step
        hours.append((START_SECONDS + training + work.evaluations * evaluation) / HOUR)
    return hours[0], hours[1], hours[2]


@dataclass(frozen=True)
class Limits:
    """How long the job may run, and its maximum cost.

    Attributes:
        max_run: seconds, after which SageMaker stops the job.
        max_wait: seconds including the wait for spot instances; None on demand.
        max_cost: the on-demand price of `max_run`, in dollars.
    """

    max_run: int
    max_wait: int | None
    max_cost: float


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
        Problem: the limits leave no time to train, or contradict each other.
    """
    seconds = HOUR * (max_run_hours if max_run_hours is not None else math.ceil(hours[2] * 1.25))
    if max_cost is not None:
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
    return Limits(max_run, int(waiting) if spot else None, max_run / HOUR * compute.price)


@dataclass(frozen=True)
class Plan:
    """All that is decided before the upload.

    Attributes:
        compute: the instances.
        work: the size of the training.
        hours: estimated hours (best, likely, worst).
        limits: maximum time and cost.
        spot: whether to use spot instances.
        image: the container image.
        places: where the weights come from, and S3 addresses, by name.
        price_source: the source of the price.
    """

    compute: Compute
    work: Work
    hours: tuple[float, float, float]
    limits: Limits
    spot: bool
    image: str
    places: dict[str, str]
    price_source: str = f"{PRICES_SOURCE} (table of {PRICES_DATE})"

    def table(self) -> str:
        """The plan as text for the terminal."""
        compute, work, limits = self.compute, self.work, self.limits
        steps = work.steps_per_epoch(compute.gpus)
        best, likely, worst = self.hours
        cost = [hours * compute.price for hours in self.hours]
        spot = [cost[1] * (1 - discount) for discount in reversed(SPOT_DISCOUNT)]
        rows = [
            ("instances", f"{compute.count} x {compute.instance_type}, ${compute.price:.2f} an hour together"),
            (
                "GPUs",
                f"{compute.gpus} x {compute.instance.gpu} with {compute.instance.gpu_memory} GB, one process each",
            ),
            ("data", f"{work.train_images:,} training images, {work.val_images:,} validation images"),
            ("global batch", f"{work.batch_size * compute.gpus} ({work.batch_size} on each GPU)"),
            ("steps", f"{steps:,} x {work.epochs} epochs = {steps * work.epochs:,}, {work.evaluations} evaluations"),
            ("image", self.image),
            *self.places.items(),
            ("time", f"about {likely:.1f} hours ({best:.1f} to {worst:.1f})"),
            ("on demand", f"about ${cost[1]:,.2f} (${cost[0]:,.2f} to ${cost[2]:,.2f})"),
            (
                "on spot",
                f"about ${spot[0]:,.2f} to ${spot[1]:,.2f}, with interruptions"
                + (" <- chosen" if self.spot else "; add --spot"),
            ),
            ("at most", f"{limits.max_run / HOUR:.1f} hours, then it is stopped: ${limits.max_cost:,.2f} on demand"),
        ]
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:<{width}}  {value}" for name, value in rows]
        return "\n".join(["Plan", *lines, "", *self.explanation(), *(f"NOTE: {note}" for note in compute.notes)])

    def explanation(self) -> Sequence[str]:
        """How the time and the prices were obtained, as lines of text."""
        instance = self.compute.instance
        peak = TERAFLOPS.get(instance.gpu, UNKNOWN_TERAFLOPS)
        shares = " / ".join(f"{share:.0%}" for share in SHARES)
        return (
            "  The time is an ESTIMATE, not a measurement (best / likely / worst): "
            f"{self.work.teraflops * TRAINING_FACTOR:.2f} teraflop of",
            f"  training per image at {shares} of the {instance.gpu}'s {peak:.0f}, gradients between hosts at",
            f"  {instance.network:g} Gb/s, the evaluations, and {START_SECONDS / 60:.0f} minutes to start.",
            f"  Prices: {self.price_source}.",
            "",
        )
