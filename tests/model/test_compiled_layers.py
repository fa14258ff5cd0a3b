"""Compiled layers: no new graphs for new sizes, and a compiler that fails ends in one warning, not in an error."""

import copy
import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from dino_lightning.export.traceable import TraceableDetector
from dino_lightning.losses import Criterion
from dino_lightning.model import DINO
from dino_lightning.model.deformable_attention import dispatch, triton_backward, triton_forward
from dino_lightning.model.residual_norm import Normed
from tests.conftest import TINY_SIZES
from tests.model.test_dino import random_batch

SIZES = [
    *((64, 96), (96, 64), (80, 80), (128, 96), (96, 160), (112, 144), (160, 96)),
    *((144, 144), (80, 128), (128, 128), (176, 96), (96, 192), (208, 64), (64, 64)),
]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(backend=None, **changes):
    torch.manual_seed(0)
    model = DINO(num_classes=3, **{**TINY_SIZES, **changes}).train()
    return model, None if backend is None else model.compile_layers(backend)


def step(model, batch):
    torch.manual_seed(1)
    model.zero_grad()
    loss = Criterion()(model(batch), batch.targets)["loss"]
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def refuses(graph, inputs):
    raise RuntimeError("no C compiler\nwas found")


REFUSES_BACKWARD = aot_autograd(fw_compiler=lambda graph, inputs: graph.forward, bw_compiler=refuses)


@pytest.mark.parametrize("backend", [refuses, REFUSES_BACKWARD], ids=["forward", "backward"])
def test_a_compiler_that_fails_leaves_the_layers_as_they_are(backend):
    batch = random_batch([(64, 96), (80, 48)], [3, 1])
    loss, gradients = step(made()[0], batch)
    model, layers = made(backend)
    with pytest.warns(UserWarning, match=r"run without being compiled, .* no C compiler was found"):
        other_loss, other_gradients = step(model, batch)
    assert torch.equal(loss, other_loss) and gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradient, other_gradients[name]) for name, gradient in gradients.items())
    assert "no C compiler was found" in layers.trouble
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, batch)


def test_layers_computed_again_on_the_way_back_stay_compiled():
    batch = random_batch([(64, 96), (80, 48)], [3, 1])
    loss, gradients = step(made()[0], batch)
    model, layers = made("aot_eager", recompute_encoder=True)
    other_loss, other_gradients = step(model, batch)
    torch.testing.assert_close(other_loss, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert layers.trouble is None


def test_what_the_layer_itself_refuses_is_no_fault_of_the_compiler():
    model, layers = made("eager")
    with pytest.raises(Exception, match=r"shape|size|dimension"):
        model.encoder.layers[0](Normed(torch.zeros(1, 5, 32)), torch.zeros(1, 4, 32), None, (), None)
    assert layers.trouble is None


def test_compiled_layers_are_evaluated_copied_and_exported_as_they_are():
    model, layers = made("eager")
    plain, batch = made()[0].eval(), random_batch([(64, 96)], [3])
    model(batch)  # compiled by now
    with torch.no_grad():
        expected = plain(batch).pred_boxes
        for other in (model.eval(), copy.deepcopy(model)):
            assert torch.equal(other(batch).pred_boxes, expected)
    sizes = torch.tensor([[64, 96]])
    program = torch.export.export(TraceableDetector(model), (model.normalize(batch.images), sizes, sizes), strict=False)
    assert layers.trouble is None
    tokens = program.module()(model.normalize(batch.images), sizes, sizes)[3]
    assert tokens.shape == (1, 12)


@pytest.mark.slow
def test_later_sizes_compile_nothing(monkeypatch):
    """As on a GPU, with the kernel's operator within the graphs; its numbers do not matter here.

    The first sizes take many graphs, as each comes with and without padding and in batches of two and of one.
    """

    def forward(value, reference_points, offsets, logits, shapes):
        return value.new_ones(value.shape[0], offsets.shape[1], value.shape[1] * value.shape[3])

    def backward(grad, value, reference_points, offsets, logits, shapes, *, reference_gradient):
        of_reference = reference_points if reference_gradient else reference_points.new_zeros(0)
        return tuple(torch.zeros_like(x) for x in (value, of_reference, offsets, logits))

    monkeypatch.setattr(dispatch, "_takes_kernel", lambda *_: True)
    monkeypatch.setattr(triton_forward, "forward", forward)
    monkeypatch.setattr(triton_backward, "backward", backward)
    counter = CompileCounterWithBackend("aot_eager")
    model, layers = made(counter, num_encoder_layers=2)
    graphs = []
    for index, (height, width) in enumerate(SIZES):
        for size in (2, 1):
            for padding in (0, 20):
                batch = random_batch([(height, width - padding)] * size, [1 + index % 4] * size, pad_to=(height, width))
                step(model, batch)
        graphs.append(counter.frame_count)
    assert layers.trouble is None
    assert graphs[-1] == graphs[8], graphs
