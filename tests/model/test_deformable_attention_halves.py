"""Deformable attention in float16 by plain PyTorch, as on a T4: close to float32, and bounded in memory."""

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from dino_lightning.model.deformable_attention import dispatch, halves

SHAPES = ((40, 52), (20, 26), (10, 13), (5, 7))
TOKENS = sum(height * width for height, width in SHAPES)


def drawn(coordinates, smooth=False, batch=2, queries=150, heads=4, dim=16):
    """Values, reference, offsets and logits; some places lie outside, and neighbours may be nearly alike."""
    draws = torch.Generator().manual_seed(0)
    value = torch.randn(batch, TOKENS, heads, dim, generator=draws)
    if smooth:
        coarse = torch.randn(batch, heads * dim, 3, 3, generator=draws)
        levels = [torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").flatten(2) for size in SHAPES]
        value = torch.cat(levels, 2).transpose(1, 2).reshape(value.shape)
    reference = torch.rand(batch, queries, 4, coordinates, generator=draws)
    offsets = 4 * torch.randn(batch, queries, heads, 4, 4, 2, generator=draws)
    logits = torch.randn(batch, queries, heads, 16, generator=draws)
    grad = torch.randn(batch, queries, heads * dim, generator=draws)
    return [value.half(), reference, offsets.half(), logits.half()], grad.half()


def both_ways(attend, given, grad):
    given = [tensor.clone().requires_grad_() for tensor in given]
    out = attend(given[0], SHAPES, *given[1:])
    return [out.detach(), *torch.autograd.grad(out, given, grad)]


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("smooth", [False, True])
def test_as_in_float32(coordinates, smooth, monkeypatch):
    given, grad = drawn(coordinates, smooth)
    expected = both_ways(dispatch.sample, [tensor.float() for tensor in given], grad.float())
    for samples in (1, 2 * 150 * 16, 2**21):  # one head at a time, two, all
        monkeypatch.setattr(halves, "SAMPLES_AT_A_TIME", samples)
        found = both_ways(halves.in_halves, given, grad)
        names = ("output", "values", "reference", "offsets", "logits")
        for name, actual, target in zip(names, found, expected, strict=True):
            off = float((actual.float() - target).abs().max() / target.abs().max())
            assert off < (0.005 if name == "values" else 0.001), (name, off)
            assert actual.dtype == (torch.float32 if name == "reference" else torch.float16)


def test_what_is_not_finite_is_passed_on():
    given, _ = drawn(2, batch=1)
    given[2][0, 7, 1, 2, 3, 0] = torch.inf
    given[2][0, 9, 2, 0, 1, 1] = torch.nan
    out = halves.in_halves(given[0], SHAPES, *given[1:]).view(150, 4, 16)
    wrong = {tuple(place) for place in (~out.isfinite()).any(-1).nonzero().tolist()}
    assert wrong == {(7, 1), (9, 2)}


def peak_of(call):
    """The most bytes that are held at a time, of what is allocated within the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_memory_follows_the_samples_at_a_time_and_not_the_heads(monkeypatch):
    queries = 600
    monkeypatch.setattr(halves, "SAMPLES_AT_A_TIME", queries * 16)
    peaks, results = [], []
    for heads in (4, 16):
        given, grad = drawn(2, batch=1, queries=queries, heads=heads, dim=8)
        peaks.append(peak_of(lambda given=given, grad=grad: both_ways(halves.in_halves, given, grad)))
        results.append(3 * sum(tensor.nbytes for tensor in given))  # clones, output and gradients
    assert 0 < peaks[0] - results[0] < 250 * queries * 16
    assert peaks[1] - peaks[0] < results[1] - results[0]


def test_older_devices_take_it_of_themselves_and_say_so(monkeypatch):
    """On a stand-in for a T4."""
    t4 = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert halves.halves_on(t4, torch.float16)
    assert not halves.halves_on(t4, torch.bfloat16) and not halves.halves_on(t4, torch.float32)
    assert not halves.halves_on(torch.device("cpu"), torch.float16)
    trouble = "the device is older than compute capability 8.0"
    call = dispatch.Call("cuda", 0, *[torch.float16] * 3, 8, 32, 4, 4, 2)
    monkeypatch.setattr(dispatch, "_found", {call: trouble})
    assert dispatch.implementation_in_use(t4) == f"PyTorch in float16 ({trouble})"
    monkeypatch.setattr(dispatch, "_found", {call._replace(value_dtype=torch.float32): trouble})
    assert dispatch.implementation_in_use(t4) == f"PyTorch ({trouble})"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert not halves.halves_on(t4, torch.float16)

    given, _ = drawn(2, batch=1)
    taken = []
    monkeypatch.setattr(dispatch, "takes_halves", lambda value: True)
    monkeypatch.setattr(dispatch, "in_halves", lambda *inputs: taken.append(inputs) or inputs[0])
    dispatch.sample(given[0], SHAPES, *given[1:])
    monkeypatch.setattr(dispatch, "_implementation", "pytorch")  # who asks for PyTorch has float32, as trials do
    out = dispatch.sample(given[0], SHAPES, *given[1:])
    assert len(taken) == 1 and out.dtype == torch.float16
