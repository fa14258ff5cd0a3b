"""Chooses the largest batch that fits into memory, and how many are accumulated for the wanted global batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng

from dino_lightning.callbacks.ema import EMA
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import OutOfMemory
from dino_lightning.structures import Batch
from dino_lightning.training.memory import (
    GIGABYTE,
    available_memory,
    estimated_peak,
    is_out_of_memory,
    peak_of_step,
    preserve_state,
    release,
    tensor_bytes,
    worst_box_count,
)
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.reading import read_checkpoint

GPU_SHARE = 0.9  # of its memory: steps of changing shapes fragment it
HOST_SHARE = 0.8  # of what is available: loaders need some, and the estimate does not include everything


@dataclass(frozen=True)
class BatchSizePlan:
    """The batch size and accumulation chosen for a run.

    Attributes:
        global_batch: the wanted number of images for each optimizer step.
        processes: training processes.
        batch_size: images for each batch of a process.
        accumulation: batches for each optimizer step.
    """

    global_batch: int
    processes: int
    batch_size: int
    accumulation: int

    def __str__(self) -> str:
        parts = [f"{self.batch_size} for each process"]
        if self.processes > 1:
            parts.append(f"{self.processes} processes")
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} batches accumulated")
        reached = self.batch_size * self.processes * self.accumulation
        line = f"Batch size: {' x '.join(parts)}, a global batch of {reached}"
        if reached != self.global_batch:
            line += f", the nearest below {self.global_batch} that all processes have an equal share of"
        return line


@dataclass(frozen=True)
class MemoryProbe:
    """The memory limit for training steps, and how to measure what a step takes.

    Attributes:
        limit: bytes.
        place: what the limit is, in words.
        measure: gives the bytes that a step on a batch takes, or raises when memory runs out.
    """

    limit: int
    place: str
    measure: Callable[[Batch], int]


class AutoBatchSize(lightning.Callback):
    """Sets the data module's `batch_size` and the Trainer's `accumulate_grad_batches` before loaders are made.

    On a GPU it takes optimizer steps on the largest batch that the dataset and the augmentation can give, with more
    and more images, and restores everything afterwards; elsewhere it estimates. All processes agree on the smallest
    of their batch sizes. A resumed run keeps the plan stored in its checkpoint if it wants the same global batch on
    the same number of processes.

    Args:
        global_batch: images for each optimizer step, over all processes and accumulated batches.
        checkpoint: the one to resume from, or None. Lightning does not tell callbacks before loaders are made.

    Raises:
        ValueError: a global batch below 1.
    """

    def __init__(self, *, global_batch: int, checkpoint: str | Path | None = None) -> None:
        if global_batch < 1:
            raise ValueError(f"auto_batch_size={global_batch} must be at least 1.")
        self.global_batch = int(global_batch)  # a plain int: checkpoints refuse the parser's own types
        self.checkpoint = checkpoint
        self.plan: BatchSizePlan | None = None

    def state_dict(self) -> dict[str, Any]:
        """The plan, saved with the checkpoint so that a resumed run has the same batches."""
        return {} if self.plan is None else asdict(self.plan)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Choose a plan, or take the one stored in the checkpoint.

        Raises:
            MisconfigurationException: the Trainer has its own accumulation, or there are fewer images in a step
                than processes.
            OutOfMemory: not even one image fits into a GPU's memory.
        """
        data = getattr(trainer, "datamodule", None)
        if stage != "fit" or not isinstance(pl_module, DINOModule) or not isinstance(data, CocoDataModule):
            return
        if self.plan is None:
            self.plan = self._stored(trainer) or self._chosen(trainer, pl_module, data)
        data.batch_size = self.plan.batch_size
        trainer.accumulate_grad_batches = self.plan.accumulation

    def _stored(self, trainer: lightning.Trainer) -> BatchSizePlan | None:
        if self.checkpoint is None:
            return None
        content = read_checkpoint(self.checkpoint)  # Lightning restores callbacks only after `setup`
        stored = content.get("callbacks", {}).get(self.state_key) if isinstance(content, dict) else None
        if not stored:
            return None
        plan = BatchSizePlan(**stored)
        if (plan.global_batch, plan.processes) != (self.global_batch, trainer.world_size):
            return None
        rank_zero_info(f"{plan}, as before in this run.")
        return plan

    def _chosen(self, trainer: lightning.Trainer, module: DINOModule, data: CocoDataModule) -> BatchSizePlan:
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "auto_batch_size chooses the accumulation itself: leave out "
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}, or set data.batch_size yourself."
            )
        processes = trainer.world_size
        share = self.global_batch // processes
        if share < 1:
            raise MisconfigurationException(
                f"auto_batch_size={self.global_batch} must be at least {processes}: each of the {processes} processes "
                "needs an image in every step."
            )
        images = max(1, len(data.train_set) // processes)
        sizes = [size for size in range(1, min(share, images) + 1) if share % size == 0]
        boxes = worst_box_count(data.most_boxes, module.model.num_denoising, module.model.denoising_rule)
        device = trainer.strategy.root_device
        with isolate_rng(), preserve_state(module.model):
            fitting, reason = largest_fitting(
                sizes,
                lambda size: data.worst_case_batch(size, num_boxes=boxes),
                _gpu_probe(trainer, module) if device.type == "cuda" else _host_probe(trainer, module),
            )
        agreed = int(trainer.strategy.reduce(torch.tensor(fitting, device=device), reduce_op="min"))
        if agreed == 0:
            raise OutOfMemory(
                f"{reason} Lower data.max_size and data.image_size, set model.recompute_encoder to true, or choose a "
                "smaller backbone."
            )
        plan = BatchSizePlan(self.global_batch, processes, agreed, share // agreed)
        if agreed < fitting:
            reason = "More do not fit on the device of another process."
        rank_zero_info(f"{plan}. {reason}")
        return plan


def largest_fitting(sizes: Sequence[int], make_batch: Callable[[int], Batch], probe: MemoryProbe) -> tuple[int, str]:
    """The largest batch size within the limit, and the reason in words; 0 if even the smallest runs out of memory.

    The smallest is taken even where it exceeds the limit, since the limit leaves some room.

    Args:
        sizes: to choose from, the smallest first.
        make_batch: gives the largest possible batch of a size.
        probe: measures what a step on it takes.
    """
    fitting, reason, beyond = 0, "", ""
    for size in sizes:
        batch = make_batch(size)
        height, width = batch.images.shape[-2:]
        boxes = 0 if batch.targets is None else max(batch.targets.num_boxes, default=0)
        case = f"images of {height} x {width} pixels (height x width) with {boxes} boxes each"
        needed = _measured(probe, batch)
        if needed is None:
            beyond = f"{size} do not fit"
            if not fitting:
                reason = f"Not even {size} of the largest {case} can be trained on: out of memory."
            break
        takes = f"{size} of the largest {case} take {needed / GIGABYTE:.2f} GB"
        if needed > probe.limit and fitting:
            beyond = f"{size} would take {needed / GIGABYTE:.2f} GB"
            break
        fitting, reason = size, takes
        if needed > probe.limit:
            beyond = "it may run out of memory"
            break
    if fitting:
        of = f"{probe.limit / GIGABYTE:.2f} GB, {probe.place}"
        reason = f"{reason} of {of}" + (f"; {beyond}." if beyond else ".")
    return fitting, reason


def _measured(probe: MemoryProbe, batch: Batch) -> int | None:
    """The bytes that a step takes; None where memory runs out."""
    try:
        return probe.measure(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release()  # only now: the error kept references to everything computed so far
    return None


def _gpu_probe(trainer: lightning.Trainer, module: DINOModule) -> MemoryProbe:
    """Measures steps on this process' GPU, to which the model is moved."""
    device, spare = trainer.strategy.root_device, _averaged_bytes(trainer, module)
    module.model.to(device)

    def measure(batch: Batch) -> int:
        precision = trainer.precision_plugin.train_step_context
        return peak_of_step(module.model, module.criterion, batch, precision=precision, spare=spare)

    total = torch.cuda.get_device_properties(device).total_memory
    return MemoryProbe(int(GPU_SHARE * total), f"{GPU_SHARE:.0%} of the memory of {device}", measure)


def _host_probe(trainer: lightning.Trainer, module: DINOModule) -> MemoryProbe:
    """Estimates steps on the host: one that is too large would end this process, and perhaps others."""
    spare = _averaged_bytes(trainer, module)

    def measure(batch: Batch) -> int:
        return estimated_peak(module.model, batch) + spare

    limit = int(HOST_SHARE * available_memory()) // trainer.num_devices
    return MemoryProbe(limit, f"{HOST_SHARE:.0%} of the memory available, by estimate", measure)


def _averaged_bytes(trainer: lightning.Trainer, module: DINOModule) -> int:
    """The bytes that averaged weights take, 0 if the run keeps none."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning, not declared
    averages = any(isinstance(callback, EMA | WeightAveraging) for callback in callbacks)
    return tensor_bytes([*module.model.parameters(), *module.model.buffers()]) if averages else 0
