"""A trial: a few dozen steps and one evaluation of the real job, and what it measures, as a file beside its output."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields

TRIAL_FILE = "trial.json"
STEPS = 40  # optimizer steps of a trial
STEPS_TO_WARM_UP = 10  # of these, not measured: memory is allocated, kernels are chosen, loaders start
VAL_IMAGES = 200  # of its evaluation, over all processes; or as many as there are


@dataclass(frozen=True)
class Measured:
    """What a trial measured.

    Attributes:
        job: the name of the training job.
        date: the day, as 2026-11-29.
        device: the name of the GPU, or "CPU".
        processes: training processes on all hosts together.
        batch_size: images in a batch of a process.
        batches_per_step: batches accumulated for an optimizer step.
        seconds_per_batch: mean of a training batch of each process, waiting for data and for other processes included.
        batches: training batches that were measured.
        waiting: the share of that time in which a process waits for the next batch of data, at most.
        memory_used: bytes of the GPU that PyTorch held at the most, of the process with the most.
        memory_total: bytes of the GPU; of the host where there is none.
        seconds_per_val_image: of an evaluation, for each image of a process.
        seconds_after_evaluation: for the metrics, the images and the checkpoints after it.
        val_images: images of each process that the evaluation had.
        seconds_to_start: from the start of the container's entry to the end of the first batch.
    """

    job: str
    date: str
    device: str
    processes: int
    batch_size: int
    batches_per_step: int
    seconds_per_batch: float
    batches: int
    waiting: float
    memory_used: int
    memory_total: int
    seconds_per_val_image: float
    seconds_after_evaluation: float
    val_images: int
    seconds_to_start: float

    @property
    def seconds_per_step(self) -> float:
        """Seconds of an optimizer step."""
        return self.seconds_per_batch * self.batches_per_step

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(asdict(self), indent=1)

    def origin(self) -> str:
        """Which trial it is from, in words."""
        return f"measured by trial {self.job} of {self.date}"

    def lines(self) -> list[str]:
        """The measurements for a reader, one a line."""
        images = self.batch_size * self.processes * self.batches_per_step
        share = self.memory_used / self.memory_total
        steps = self.batches / self.batches_per_step
        return [
            f"{self.seconds_per_step:.3f} seconds a step of {images} images ({images / self.seconds_per_step:.1f} "
            f"images/s), over {steps:.0f} steps on {self.processes} x {self.device}",
            f"{self.waiting:.0%} of that time at most waits for data",
            f"{self.memory_used / 1e9:.1f} GB of {self.memory_total / 1e9:.1f} GB of memory used ({share:.0%}); "
            "batches with larger images or more boxes may need more",
            f"{self.seconds_per_val_image * self.val_images:.1f} seconds for {self.val_images} validation images of "
            f"each process, and {self.seconds_after_evaluation:.1f} seconds for metrics and checkpoints",
            f"{self.seconds_to_start:.0f} seconds from the start of the container to the first step",
        ]


def read_measured(text: str) -> Measured | None:
    """The measurements in a file's content; None if it is not such a file, or of another version."""
    try:
        content = json.loads(text)
        found = Measured(**content)
        numbers = [getattr(found, field.name) for field in fields(Measured) if field.type in ("int", "float")]
        valid = all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in numbers)
    except (ValueError, TypeError):
        return None
    positive = valid and min(found.processes, found.seconds_per_batch, found.batches_per_step, found.memory_total) > 0
    return found if positive else None
