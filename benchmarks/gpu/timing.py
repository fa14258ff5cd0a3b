"""Times on a device: CUDA graphs replayed between CUDA events, so that the host's launches do not count."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.gpu.report import last_line
from benchmarks.measure import Timing, by_events

Call = Callable[[], object]
MakeCall = Callable[[], Call]


def replayed(makers: Mapping[str, MakeCall], device: str, *, rounds: int = 5, repeats: int = 20) -> dict[str, Any]:
    """Seconds of each contestant, in turns: replays of a graph of it on a GPU; on a CPU one plain call, to try it out.

    What cannot be captured in a graph (it waits for the device, say) is timed as plain launches, and says so.

    Args:
        makers: by name, a function that prepares the contestant (a forward pass before its backward pass, say) and
            returns what is timed. It runs on the stream that is captured: a backward pass runs on the stream of its
            forward pass.
        device: "cuda" or "cpu".
        rounds: how often each is timed.
        repeats: replays in each round.

    Returns:
        By name: `min`, `median`, `spread` and `rounds` as of `Timing`, and `by`: graph, launches or clock; `no graph`:
        why there is none; or `error` alone.
    """
    if device == "cpu":
        return {name: {**_once(make()).as_json(), "by": "clock"} for name, make in makers.items()}
    stream = torch.cuda.Stream()
    calls: dict[str, Call] = {}
    told: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        try:
            calls[name], told[name] = _captured(make, stream)
        except Exception as error:  # one contestant's trouble is not that of the others
            told[name] = {"error": last_line(error)}
    timings = by_events(calls, rounds=rounds, repeats=repeats, stream=stream)
    return {name: {**timings[name].as_json(), **said} if name in timings else said for name, said in told.items()}


def _once(call: Call) -> Timing:
    start = time.perf_counter()
    call()
    return Timing((time.perf_counter() - start,))


def _captured(make: MakeCall, stream: torch.cuda.Stream) -> tuple[Call, dict[str, Any]]:
    """A replay of the call, or the call itself where it cannot be captured."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):  # compiles, tries kernels out, fills caches: none of it may happen in a capture
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = call()
    except Exception as error:  # ending the capture fails too, and its error hides the first one
        torch.cuda.synchronize()
        return call, {"by": "launches", "no graph": last_line(error.__context__ or error)}

    def replay(_kept: object = kept) -> None:  # what the capture returned lies in the memory of the graph
        graph.replay()

    return replay, {"by": "graph"}
