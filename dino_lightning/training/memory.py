"""The memory that a training step takes, measured on a GPU and estimated elsewhere, and the memory available."""

from __future__ import annotations

import contextlib
import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_lightning.losses import Criterion, HungarianMatcher, Matches
from dino_lightning.model import DINO
from dino_lightning.model.denoising import DenoisingRule, num_denoising_groups
from dino_lightning.structures import Batch, Targets

Precision = Callable[[], contextlib.AbstractContextManager[Any]]

ADAM_MOMENTS = 2  # tensors that AdamW keeps for each parameter
GIGABYTE = 1e9
SCRATCH = 300_000_000  # bytes, the most that convolutions on a CPU allocated internally in the measured sizes
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA and MPS
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the device or the host ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


@dataclass(frozen=True)
class StepSize:
    """The sizes that determine the memory of a batch.

    Attributes:
        images: in the batch.
        canvas: (height, width) in pixels.
        boxes: in the image that has the most.
        denoising_queries: for each image.
    """

    images: int
    canvas: tuple[int, int]
    boxes: int
    denoising_queries: int

    @classmethod
    def of(cls, batch: Batch, model: DINO) -> StepSize:
        """The size of a batch in training, or without denoising queries in evaluation."""
        boxes = 0 if batch.targets is None else max(batch.targets.num_boxes, default=0)
        height, width = batch.images.shape[-2:]
        queries = denoising_queries(model.num_denoising, boxes, model.denoising_rule) if model.training else 0
        return cls(images=len(batch), canvas=(height, width), boxes=boxes, denoising_queries=queries)

    def __str__(self) -> str:
        images = f"{self.images} image" + "s" * (self.images != 1)
        return (
            f"{images} on a canvas of {self.canvas[0]} x {self.canvas[1]} pixels (height x width), up to "
            f"{self.boxes} boxes and {self.denoising_queries} denoising queries an image"
        )


def denoising_queries(num_denoising: int, boxes: int, rule: DenoisingRule = "boxes") -> int:
    """The number of denoising queries for each image of a batch in which the largest number of boxes is `boxes`."""
    return 2 * num_denoising_groups(num_denoising, boxes, rule) * boxes if num_denoising else 0


def worst_box_count(most_boxes: int, num_denoising: int, rule: DenoisingRule = "boxes") -> int:
    """The count up to `most_boxes` with the most queries (not always the largest, as groups are complete)."""
    return max(range(most_boxes + 1), key=lambda count: (denoising_queries(num_denoising, count, rule), count))


# ---------------------------------------------------------------------- on the device


def peak_of_step(
    model: DINO, criterion: Criterion, batch: Batch, *, precision: Precision = contextlib.nullcontext, spare: int = 0
) -> int:
    """Take optimizer steps and return the peak memory in bytes in use on the GPU.

    Other processes on the device count as well. Parameters and buffers change; see `preserve_state`.

    Args:
        model: on a GPU.
        criterion: the loss.
        batch: on the host.
        precision: makes the context for the forward pass.
        spare: bytes that the run needs besides its steps.

    Raises:
        RuntimeError: out of memory, see `is_out_of_memory`.
    """
    device = model.level_embedding.device
    release()
    torch.cuda.reset_peak_memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    take_steps(model, criterion, batch.to(device), precision=precision)
    torch.cuda.synchronize(device)
    return others + torch.cuda.max_memory_allocated(device) + spare


def take_steps(
    model: DINO, criterion: Criterion, batch: Batch, *, precision: Precision = contextlib.nullcontext
) -> None:
    """Take two optimizer steps; like the steps of a run, the second has optimizer state and accumulated gradients."""
    # One colour near the mean of photographs: with random weights, a deep backbone would overflow on contrasts.
    batch.images.copy_(model.image_mean.expand_as(batch.images))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, fused=batch.images.device.type in ("cpu", "cuda"))
    for _ in range(2):
        with precision():
            loss = _loss(model, criterion, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types here
        optimizer.step()


def _loss(model: DINO, criterion: Criterion, batch: Batch) -> Tensor:
    assert batch.targets is not None
    # Given the number of boxes, the criterion does not communicate: another rank may have no batch that fits.
    alone = torch.ones((), device=batch.images.device)
    losses: dict[str, Tensor] = criterion(model(batch), batch.targets, batch.image_ids, num_boxes=alone)
    return losses["loss"]


@contextlib.contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Restore the model's parameters, buffers and gradients, and their devices, at the end of the block."""
    tensors = [*model.parameters(), *model.buffers()]
    # By name as well: moved to another device, a parameter stays the same object, a buffer does not.
    named = [(part, name, buffer) for part in model.modules() for name, buffer in part.named_buffers(recurse=False)]
    before = [(tensor, tensor.device, tensor.detach().cpu().clone(), tensor.grad) for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, device, values, gradient in before:
            tensor.grad = None
            tensor.data = values.to(device)
            tensor.grad = gradient
        for part, name, buffer in named:
            setattr(part, name, buffer)
        release()


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The total size of the tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def release() -> None:
    """Free unused memory, of Python and of CUDA's cache."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # does nothing where CUDA has not been used


# ---------------------------------------------------------------------- on the host


def estimated_peak(model: DINO, batch: Batch) -> int:
    """The peak memory in bytes of steps on a batch, without the parameters and the batch itself.

    Forward and backward pass run on fake tensors, which have shapes and no content; the tensors that operations make
    are counted as long as they live. Memory within operations is not seen; `SCRATCH` allows for it. Running averages
    of norms change; see `preserve_state`.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    live = _LiveBytes()
    criterion = Criterion(matcher=_AnyMatch())
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        torch.autograd.grad(_loss(model, criterion, batch), trainable, allow_unused=True)
    # the optimizer's state, and gradients that are being accumulated
    return live.peak + (ADAM_MOMENTS + 1) * tensor_bytes(trainable) + SCRATCH


class _AnyMatch(HungarianMatcher):
    """Assigns every box to the first query: fake tensors have no costs to compare, only shapes."""

    def forward(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: Targets, image_ids: Sequence[int] | None = None
    ) -> Matches:
        """Compute the costs for their memory, and return the assignment to query 0."""
        self.cost(logits, boxes_cxcywh, targets)
        queries = torch.zeros((len(logits), *targets.labels.shape), dtype=torch.int64, device=logits.device)
        return Matches(queries=queries, matched=queries >= 0)


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Adds up the sizes of the living tensors that operations made, and keeps the peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {id(leaf.untyped_storage()) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), inputs)
        return result

    def _count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in inputs:  # a view
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def available_memory() -> int:
    """The bytes of memory available to this process, file caches included; a container's limit counts."""
    groups = Path("/sys/fs/cgroup")
    found = [
        _left_in_group(groups / "memory.max", groups / "memory.current", groups / "memory.stat"),
        _left_in_group(
            groups / "memory/memory.limit_in_bytes",
            groups / "memory/memory.usage_in_bytes",
            groups / "memory/memory.stat",
        ),
        _left_in_machine(Path("/proc/meminfo")),
    ]
    known = [value for value in found if value is not None]
    return min(known) if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_in_group(limit: Path, usage: Path, statistics: Path) -> int | None:
    """The bytes left in a control group; None without one, or without a limit."""
    try:
        most, used = limit.read_text().strip(), int(usage.read_text())
        lines = dict(line.split() for line in statistics.read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdigit():  # "max"
        return None
    pages = int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))  # file caches, freed on demand
    return max(0, int(most) - used + pages)


def _left_in_machine(meminfo: Path) -> int | None:
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
