"""CUDA graphs without a GPU: a stand-in whose results are overwritten, as theirs are, when a step begins.

What is shown: nothing that training keeps lies in memory of a graph, and graphs that fail, on whichever way, or that
compute something else, end in compiled layers without them and one warning.
"""

import warnings

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from dino_lightning.losses import Criterion
from dino_lightning.model import DINO, compiled_layers
from dino_lightning.training.graph_trial import trouble_with_graphs
from tests.conftest import TINY_SIZES
from tests.model.test_compiled_layers import made, step
from tests.model.test_dino import random_batch

SMALL = {"num_encoder_layers": 1, "num_decoder_layers": 1}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Pool:
    """As the memory of CUDA graphs: what compiled code returned is overwritten once a step begins."""

    def __init__(self, fails=lambda calls, is_backward: None):
        self.storages, self.calls, self.fails = [], {False: 0, True: 0}, fails
        self.backend = aot_autograd(
            fw_compiler=lambda graph, inputs: self.returned(graph, False),
            bw_compiler=lambda graph, inputs: self.returned(graph, True),
        )

    def returned(self, graph, is_backward):
        @torch._functorch.aot_autograd.make_boxed_func
        def call(*given):
            self.calls[is_backward] += 1
            out = graph(*given)
            factor = self.fails(self.calls[is_backward], is_backward)
            if factor is not None:
                out = [factor * one if torch.is_tensor(one) and one.is_floating_point() else one for one in out]
            inputs = {one.untyped_storage().data_ptr() for one in given if torch.is_tensor(one)}
            for one in out:
                if torch.is_tensor(one) and one.untyped_storage().data_ptr() not in inputs:
                    self.storages.append((one.untyped_storage(), one.dtype))  # not the tensor: autograd counts those
            return out

        return call

    def begin_step(self):
        for storage, dtype in self.storages:
            torch.empty(0, dtype=dtype).set_(storage).fill_(77)
        self.storages.clear()


def graphed(monkeypatch, pool, **changes):
    monkeypatch.setattr(compiled_layers, "GRAPHED", {"backend": pool.backend})
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", pool.begin_step)
    torch.manual_seed(0)
    model = DINO(num_classes=3, **{**TINY_SIZES, **changes}).train()
    return model, model.compile_layers("aot_eager", cuda_graphs=True)


def batch_of(*counts):
    return random_batch([(64, 96)] * len(counts), list(counts))


def fails(at, is_backward):
    def fail(calls, backward):
        if backward is is_backward and calls == at:
            raise RuntimeError("operation not permitted when\nstream is capturing")

    return fail


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fail", "said"),
    [
        pytest.param(lambda calls, backward: None, None, id="nothing"),
        pytest.param(fails(3, False), "not permitted when stream is capturing", id="forward"),
        pytest.param(fails(3, True), "not permitted when stream is capturing", id="backward"),
        pytest.param(lambda calls, backward: 1.5 if backward and calls > 4 else None, "off by", id="other numbers"),
        pytest.param(lambda calls, backward: float("nan") if calls > 4 else None, "off by inf", id="not finite"),
    ],
)
def test_graphs_are_used_where_a_trial_is_passed(fail, said, monkeypatch):
    batch = batch_of(2, 1)
    expected, gradients = step(made("aot_eager", **SMALL)[0], batch)
    torch._dynamo.reset()
    model, layers = graphed(monkeypatch, Pool(fail), **SMALL)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    draws = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        trouble = trouble_with_graphs(model, layers, batch)
        if trouble is not None:
            layers.give_up_graphs(trouble)
        assert torch.equal(draws, torch.get_rng_state())
        assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert all(module.training for module in model.modules())
        loss, others = step(model, batch)
    of_graphs = [str(one.message) for one in warned if "CUDA graphs" in str(one.message)]
    assert layers.cuda_graphs is (said is None) and len(of_graphs) == (0 if said is None else 1)
    assert said is None or (said in layers.trouble_with_graphs and said in of_graphs[0])
    assert layers.trouble is None and torch.equal(loss, expected)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_graphs_that_pytorch_leaves_out_are_told(monkeypatch):
    """As it does for code with an operation on the host; it says so in a log that nobody reads."""
    from torch._dynamo.utils import counters

    def leaves_out(calls, backward):
        if calls == 1 and not backward:
            counters["inductor"]["cudagraph_skips"] += 1

    model, layers = graphed(monkeypatch, Pool(leaves_out), **SMALL)
    assert "PyTorch left out 1 of them" in trouble_with_graphs(model, layers, batch_of(2, 1))


def test_where_the_compiler_fails_as_well_the_layers_run_as_they_are(monkeypatch):
    def refuses(graph, inputs):
        raise RuntimeError("no C compiler")

    batch = batch_of(2, 1)
    expected, _ = step(made(**SMALL)[0], batch)
    monkeypatch.setattr(compiled_layers, "GRAPHED", {"backend": refuses})
    torch.manual_seed(0)
    model = DINO(num_classes=3, **{**TINY_SIZES, **SMALL}).train()
    layers = model.compile_layers(refuses, cuda_graphs=True)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        loss, _ = step(model, batch)
    for said in ("compiled without CUDA graphs", "run without being compiled"):
        assert sum(said in str(one.message) for one in warned) == 1
    assert torch.equal(loss, expected)
    assert "no C compiler" in layers.trouble and "no C compiler" in layers.trouble_with_graphs


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_gradients_of_several_batches_outlive_the_memory_of_graphs(kept, monkeypatch):
    batches = [random_batch([(64, 96), (64, 96)], count) for count in ([3, 1], [2, 2])]
    pool = Pool()
    found = {}
    for name in ("as it is", "graphs"):
        model, layers = graphed(monkeypatch, pool) if name == "graphs" else made("aot_eager")
        torch.manual_seed(1)
        for batch in batches:
            layers.begin_step()
            Criterion()(model(batch), batch.targets)["loss"].backward()
            if kept:
                layers.keep_gradients()
        layers.begin_step()  # whoever looks at gradients now, as a callback may, sees what they were
        found[name] = {one: parameter.grad for one, parameter in model.named_parameters() if parameter.grad is not None}
    expected, actual = found.values()
    assert expected.keys() == actual.keys()
    same = all(torch.equal(gradient, actual[one]) for one, gradient in expected.items())
    assert same is kept
    assert layers.cuda_graphs and pool.calls[True] > 2 * len(layers._layers)
