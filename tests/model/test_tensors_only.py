"""Between the host's part and the losses the device works alone, as a CUDA graph of that part would ask for.

On the device `meta` tensors have no values: whatever needs one on the host fails there, and so does a size that follows
from values.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_lightning.model import DINO
from dino_lightning.model.deformable_attention import dispatch
from tests.conftest import TINY_SIZES
from tests.model.test_dino import random_batch


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """With the kernel of deformable attention, and without autocast, which `meta` does not have."""
    monkeypatch.setattr(dispatch, "_takes_kernel", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)


class OnDevice(TorchDispatchMode):
    """Refuses tensors of the host: those that come from there, those made of Python's numbers, those that go there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{name} touches the host"
        return out


class NoNumbers(TorchFunctionMode):
    """Refuses tensors that are made of numbers on the host, and copied to the device unseen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), "numbers on the host"
        return func(*args, **(kwargs or {}))


def run(model, batch):
    prepared = model.prepare(batch, model.feature_maps(batch.images))
    with OnDevice(), NoNumbers():
        output = model.detect(model.feature_maps(batch.images), prepared)
        parts = [output.pred_logits, output.pred_boxes, output.encoder_logits, output.encoder_boxes]
        if output.denoising is not None:
            parts += [output.denoising.pred_logits, output.denoising.pred_boxes]
        sum(part.sum() for part in parts).backward()


def model_and_batch(sizes=((64, 96), (80, 48)), **changes):
    model = DINO(num_classes=3, **{**TINY_SIZES, **changes}).to("meta").train()
    return model, random_batch(list(sizes), [3, 1]).to("meta")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sizes": ((64, 96), (64, 96))},
        {"num_denoising": 0},
        {"denoising_multiple": 7, "query_groups": 2, "dropout": 0.1},
        {"shared_heads": False, "recompute_encoder": True},
        {"backbone": "resnet18", "backbone_norm": "frozen", "trainable_backbone_layers": 3},
    ],
    ids=str,
)
def test_the_device_works_alone(changes):
    model, batch = model_and_batch(**changes)
    run(model, batch)
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())


@pytest.mark.parametrize(
    ("disturb", "said"),
    [
        (lambda x: x * float(x.sum()), "meta tensors"),
        (lambda x: x[x > 0].sum() + x, "nonzero"),
        (lambda x: x.cpu().to("meta"), "Cannot copy out of meta tensor"),
        (lambda x: x + torch.tensor([1.0], device="meta"), "numbers on the host"),
        (lambda x: x + torch.ones(1).to("meta"), "touches the host"),
        (lambda x: x + torch.ones(()), "touches the host"),
    ],
)
def test_a_touch_of_the_host_is_seen(monkeypatch, disturb, said):
    model, batch = model_and_batch()
    original = model.query_selection.output_norm.forward
    monkeypatch.setattr(model.query_selection.output_norm, "forward", lambda x: disturb(original(x)))
    prepared = model.prepare(batch, model.feature_maps(batch.images))
    with OnDevice(), NoNumbers(), pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=said):
        model.detect(model.feature_maps(batch.images), prepared)


class Backwards(torch.autograd.Function):
    """Leaves a tensor as it is, and disturbs its gradient."""

    @staticmethod
    def forward(ctx, x, disturb):
        ctx.disturb = disturb
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.disturb(grad), None


@pytest.mark.parametrize(
    ("disturb", "said"),
    [
        (lambda grad: grad * float(grad.sum()), "meta tensors"),
        (lambda grad: grad.cpu().to("meta"), "Cannot copy out of meta tensor"),
        (lambda grad: grad * torch.ones(()), "touches the host"),
    ],
)
def test_a_touch_of_the_host_on_the_way_back_is_seen(monkeypatch, disturb, said):
    model, batch = model_and_batch()
    original = model.query_selection.output_norm.forward
    monkeypatch.setattr(model.query_selection.output_norm, "forward", lambda x: Backwards.apply(original(x), disturb))
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=said):
        run(model, batch)
