"""How long a training takes on some instances, computed from its operations: before anything was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sagemaker_entry.laptop.compute import Compute
from sagemaker_entry.laptop.length import Length

if TYPE_CHECKING:
    from sagemaker_entry.laptop.training_config import Training

# Peak dense half-precision teraflops of a GPU, and the fraction of the peak that training reaches: (best, likely,
# worst). The A10G's number is NVIDIA's. The L4 has twice as many on paper, but half of the A10G's memory bandwidth,
# which limits training, so a lower number is used; for the same reason the L40S and the H100 have lower numbers than on
# paper. The fractions are estimates, not yet measured on such a GPU.
TERAFLOPS = {"A10G": 70.0, "L4": 60.0, "T4": 65.0, "V100": 125.0, "L40S": 180.0, "A100": 312.0, "H100": 600.0}
UNKNOWN_TERAFLOPS = 70.0
SHARES = (0.15, 0.08, 0.04)
TRAINING_FACTOR = 3.0  # forward and backward together cost about three forward passes
BYTES_PER_PARAMETER = 4
START_SECONDS = 300.0  # download of image and data, installation, first step
EVALUATION_SECONDS = 15.0  # metrics, images and checkpoint after each evaluation
HOUR = 3600.0


@dataclass(frozen=True)
class Amount:
    """What a training computes on a number of GPUs.

    Attributes:
        batch_size: images in a batch of a process.
        batches: training batches of each process in an epoch.
        epochs: epochs that are begun.
        steps: optimizer steps of the whole training.
        all_batches: training batches of each process in the whole training.
        evaluations: evaluations of the whole training.
        val_images: images of an evaluation, over all processes.
    """

    batch_size: int
    batches: int
    epochs: int
    steps: int
    all_batches: int
    evaluations: int
    val_images: int


@dataclass(frozen=True)
class Work:
    """The size of the training, from which its time is estimated.

    Attributes:
        train_images: images in an epoch.
        val_images: images in the validation split.
        length: the options that decide how many batches, steps and evaluations there are.
        batch_size: images per step and GPU.
        teraflops: 10^12 floating-point operations of a forward pass of one image.
        parameters: trainable parameters, whose gradients the hosts exchange.
        compressed: whether the gradients are sent with half the bytes.
    """

    train_images: int
    val_images: int
    length: Length
    batch_size: int
    teraflops: float
    parameters: int
    compressed: bool = False

    def on(self, gpus: int) -> Amount:
        """What it computes on so many GPUs."""
        length = self.length
        size = length.batch_size(self.batch_size, gpus)
        batches = length.batches(self.train_images, size, gpus)
        return Amount(
            batch_size=size,
            batches=batches,
            epochs=length.epochs(batches),
            steps=length.steps(batches),
            all_batches=length.all_batches(batches),
            evaluations=length.evaluations(batches),
            val_images=length.val_images(self.val_images, gpus),
        )


def work_of(training: Training) -> Work:
    """The size of a training, for its estimate."""
    return Work(
        train_images=training.train_images,
        val_images=training.val_images,
        length=training.length,
        batch_size=training.batch_size,
        teraflops=training.teraflops,
        parameters=training.parameters,
        compressed=training.options["compress_gradients"],
    )


def estimate_hours(work: Work, compute: Compute) -> tuple[float, float, float]:
    """Estimated billed hours: (best, likely, worst).

    A batch costs three forward passes at a fraction of the GPU's peak, and an optimizer step exchanges 4 bytes for each
    parameter between hosts at the network's baseline bandwidth. In the best case computation hides the exchange, in the
    likely case half of it, in the worst case none. An evaluation is a forward pass of the validation images.
    """
    amount = work.on(compute.gpus)
    peak = TERAFLOPS.get(compute.instance.gpu, UNKNOWN_TERAFLOPS)
    between_hosts = 2 * (compute.count - 1) / compute.count  # times that a ring all-reduce sends each byte
    size = work.parameters * BYTES_PER_PARAMETER / (2 if work.compressed else 1)
    exchange = size * 8 * between_hosts / (compute.instance.network * 1e9)
    hours = []
    for share, hidden in zip(SHARES, (1.0, 0.5, 0.0), strict=True):
        forward = work.teraflops / (peak * share)  # seconds for one image
        batch = TRAINING_FACTOR * forward * amount.batch_size
        exchanging = max(batch, exchange, batch + (1 - hidden) * exchange)  # the last batch of a step
        training = amount.all_batches * batch + amount.steps * (exchanging - batch)
        evaluation = math.ceil(amount.val_images / compute.gpus) * forward + EVALUATION_SECONDS
        hours.append((START_SECONDS + training + amount.evaluations * evaluation) / HOUR)
    return hours[0], hours[1], hours[2]
