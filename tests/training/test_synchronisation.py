"""From the batch to the end of the optimizer's step, there is one device synchronisation: for the matcher's costs."""

from collections import Counter

import lightning
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dino_lightning import CocoDataModule, DINOModule
from tests.conftest import TINY_SIZES

# Operators whose result the host needs; on a GPU each of them is a device synchronisation.
WAITING_OPERATORS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
    "aten::is_nonzero",
}
# Methods that copy to the host; on the CPU most of them never reach an operator.
WAITING_METHODS = {"cpu", "numpy", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class WaitingOperators(TorchDispatchMode):
    """Counts operators that synchronise with the device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in WAITING_OPERATORS:
            self.seen[name] += 1
        # a boolean index is a nonzero inside the operator
        if name == "aten::index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            self.seen["boolean index"] += 1
        return func(*args, **(kwargs or {}))


class WaitingMethods(TorchFunctionMode):
    """Counts copies to the host."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITING_METHODS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Watch(lightning.Callback):
    """Counts during one training step, from the start of the batch to the end of everything about it."""

    def __init__(self, step):
        self.step = step
        self.waits = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.step:
            self.modes = WaitingOperators(), WaitingMethods()
            for mode in self.modes:
                mode.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.step:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)
            self.waits = self.modes[0].seen + self.modes[1].seen


def waits_of_a_step(rooms, tmp_path, *, every=50, step=2, **options):
    torch.manual_seed(0)
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)
    module = DINOModule(num_classes=data.num_classes, backbone_weights=None, **{**TINY_SIZES, **options})
    watch = Watch(step)
    lightning.Trainer(
        accelerator="cpu",
        max_steps=step + 1,
        log_every_n_steps=every,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=True,
        enable_model_summary=False,
        callbacks=[watch],
        default_root_dir=tmp_path,
    ).fit(module, data)
    return watch.waits


@pytest.mark.parametrize("options", [{}, {"dropout": 0.1}, {"num_denoising": 0}], ids=str)
def test_a_step_waits_for_the_matcher_alone(rooms, tmp_path, options):
    assert waits_of_a_step(rooms, tmp_path, **options) == {"cpu": 1, "numpy": 1}  # one copy, seen by both names


def test_a_step_whose_assignments_the_device_solves_waits_for_a_few_marks(rooms, tmp_path, monkeypatch):
    """With a stand-in for the kernel, box i takes query i: only the marks of what is not finite come to the host."""
    from dino_lightning.losses import matcher

    def solve(cost, num_boxes):
        layers, batch, boxes, queries = cost.shape
        there = torch.arange(boxes) < torch.tensor(num_boxes).clamp(max=queries)[:, None]
        return torch.where(there, torch.arange(boxes), -1).expand(layers, -1, -1), torch.zeros((layers, batch)).int()

    monkeypatch.setattr(matcher, "takes_device", lambda solver, cost, num_boxes: solver == "device")
    monkeypatch.setattr(matcher, "solve_on_device", solve)
    assert waits_of_a_step(rooms, tmp_path, matching_solver="device") == {"cpu": 1, "numpy": 1}


def test_the_count_sees_a_wait(rooms, tmp_path, monkeypatch):
    original = DINOModule.training_step

    def waiting(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        assert loss > 0
        return loss + batch.targets.boxes_cxcywh[batch.targets.valid].sum() * 0.0

    monkeypatch.setattr(DINOModule, "training_step", waiting)
    seen = waits_of_a_step(rooms, tmp_path)
    assert seen["aten::_local_scalar_dense"] == 1 and seen["boolean index"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["scipy", "device"])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_no_step_waits_more_than_once_on_a_gpu(rooms, tmp_path, monkeypatch, solver):
    from dino_lightning.losses import matcher

    torch.manual_seed(0)
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)
    module = DINOModule(
        num_classes=data.num_classes, backbone_weights=None, matching_solver=solver, **TINY_SIZES
    ).cuda()
    batch = next(iter(data.train_dataloader())).pin_memory().to("cuda")
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    to_host_later, waits = matcher.to_host_later, []

    def counted_later(tensor):
        wait = to_host_later(tensor)  # nothing waits yet, or the debug mode would say so

        def counted_wait():
            waits.append("marks" if tensor.dtype == torch.int32 else "costs")
            return wait()

        return counted_wait

    monkeypatch.setattr(matcher, "to_host_later", counted_later)
    try:
        for _ in range(3):
            torch.cuda.set_sync_debug_mode("error")
            loss = module.criterion(module.model(batch), batch.targets)["loss"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == ["costs" if solver == "scipy" else "marks"] * 3
