"""Contestants timed in turns in one process: a busy machine slows all of them alike, and the ratio is the result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round.

    Attributes:
        seconds: one entry for each round.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Largest minus smallest round, as a share of the median."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def as_json(self) -> dict[str, Any]:
        """Minimum and median in seconds, spread as a share of the median, and the seconds of all rounds."""
        return {"min": min(self.seconds), "median": self.median, "spread": self.spread, "rounds": self.seconds}


def interleaved(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    repeats: Mapping[str, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each contestant once in each round, after one warm-up round.

    Args:
        contestants: what to call, by name.
        rounds: how many rounds count; at least 5.
        repeats: calls in each round, for contestants too fast to be timed once; the time is given for one call.
        clock: `time.thread_time` for work that one thread does: other processes do not disturb it.
    """
    if rounds < 5:
        raise SystemExit(f"{rounds} rounds say too little about the spread; take 5 or more.")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, call in contestants.items():
            times = 1 if repeats is None else repeats.get(name, 1)
            start = clock()
            for _ in range(times):
                call()
            if number > 0:
                seconds[name].append((clock() - start) / times)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def by_events(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    repeats: int,
    stream: torch.cuda.Stream | None = None,
) -> dict[str, Timing]:
    """As `interleaved`, timed with CUDA events around `repeats` calls, on a stream of their own if one is given."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        for number in range(rounds + 1):
            for name, call in contestants.items():
                start.record()
                for _ in range(repeats):
                    call()
                end.record()
                end.synchronize()
                if number > 0:
                    seconds[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def environment() -> dict[str, Any]:
    """Device, package versions and commit that a measurement was made with."""
    packages = (
        *("torch", "torchvision", "triton", "lightning", "onnxruntime", "openvino"),
        *("pillow", "numpy", "scipy", "transformers", "rfdetr"),
    )
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {name: version for name in packages if (version := _version(name)) is not None},
        "commit": _commit(),
        "command": command_line(),
    }


def command_line() -> str:
    """The command that runs, as it repeats the measurement: of files in other folders only the names."""
    return " ".join(["python -m", *(Path(part).name if part.startswith("/") else part for part in sys.orig_argv[2:])])


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, under a temporary name first."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows as aligned text; the first row is the header, the first column is left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
