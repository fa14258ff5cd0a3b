"""Everything that a GPU can say, in ten minutes: `python -m benchmarks gpu`.

Each part is a process of its own with its own time limit; the file of `--output` is rewritten after each, and a short
table comes last. What a part does not need of its time goes to those after it. A part that fails or runs out of time is
reported, with what it had measured until then, and the next one runs: the exit code is 1 only if no part measured
anything.

`--device cpu` runs every part at small sizes, to find mistakes before a GPU is paid for; its numbers mean nothing.
`--baseline module:callable` is measured beside deformable attention (part 2): it takes `benchmarks.op.Inputs` and
returns (B, Q, H * D). `--kernel module:callable` is another backward kernel (part 3), called as that of
`triton_backward`, and `--stored DIR` has those that another Triton compiled, see `benchmarks.gpu.compiled`.
`--solver module:callable` is another solver of assignments (part 7), see `benchmarks.gpu.matching`.
`--write-results gpu.json` measures nothing: it writes the GPU section of benchmarks/RESULTS.md from the file.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu import table
from benchmarks.measure import command_line, save
from dino_lightning.cli.command import HelpFormatter

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "benchmarks" / "RESULTS.md"
MARGIN = 15.0  # seconds of the minutes asked for that no part gets: the start, and whoever stops the whole
WARNING = 4.0  # seconds before its limit at which a part should have ended by itself


@dataclass(frozen=True)
class Part:
    """One of the measurements.

    Attributes:
        title: what it is, in a few words.
        seconds: its share of the time, about what it needs on a GPU.
        seconds_on_cpu: its share on a CPU, at small sizes.
        call: `module:function`, imported in the part's own process; it takes a `report.Report`.
        interpreted: whether Triton interprets its kernels in it on a CPU, so that they run.
    """

    title: str
    seconds: float
    seconds_on_cpu: float
    call: str
    interpreted: bool = False


HERE = "benchmarks.gpu"
PARTS = {
    0: Part("versions, copy bandwidth, matrix products", 20, 6, f"{HERE}.ceilings:ceilings"),
    1: Part("tests of deformable attention, compilation", 100, 22, f"{HERE}.kernels:tests_and_compilation"),
    2: Part("deformable attention, each way alone", 100, 32, f"{HERE}.attention:operator", interpreted=True),
    3: Part("backward kernel compiled for sm_86", 60, 10, f"{HERE}.kernels:sm_86"),
    4: Part("training step, eager bf16", 110, 15, f"{HERE}.steps:eager"),
    5: Part("training step, compiled bf16, with CUDA graphs", 160, 34, f"{HERE}.steps:compiled"),
    6: Part("changes to the step, one by one", 60, 14, f"{HERE}.levers:levers"),
    7: Part("matching: where it is solved", 40, 12, f"{HERE}.matching:matching", interpreted=True),
    8: Part("a whole fit on drawn plans", 70, 18, f"{HERE}.fit:fit"),
    9: Part("training step beside transformers' Deformable DETR", 40, 26, f"{HERE}.steps:peer"),
    10: Part("ncu of the backward kernel", 30, 8, f"{HERE}.ncu:backward", interpreted=True),
}


def main() -> None:
    """Run the parts, or write a file of theirs into RESULTS.md; exits with 1 if no part measured anything."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=HelpFormatter,
        epilog="parts:\n" + "\n".join(f"  {number:<3} {part.title}" for number, part in PARTS.items()),
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of wall clock, for all parts together")
    parser.add_argument("--parts", type=_numbers, default=tuple(PARTS), help="some of them, such as 0,2,4")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--baseline", help="module:callable, for part 2")
    parser.add_argument("--kernel", help="module:callable, for part 3")
    parser.add_argument("--stored", type=_folder, help="kernels that another Triton compiled, for part 3")
    parser.add_argument("--solver", help="module:callable, for part 7")
    parser.add_argument("--output", type=Path, help="write all numbers to this JSON file, after each part")
    parser.add_argument("--write-results", type=Path, metavar="JSON", help="write this file's numbers to RESULTS.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_results is not None:
        table.write_section(json.loads(options.write_results.read_text(encoding="utf-8")), options.results)
        print(f"wrote the GPU section of {options.results}")
        return
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
    found = run_parts(options)
    print()
    print(table.as_text(found))
    if not any(part["results"] for part in found["parts"].values()):
        raise SystemExit("No part measured anything; each says why in its line of the table.")


def run_parts(options: argparse.Namespace) -> dict[str, Any]:
    """Run one part after the other; returns what `--output` holds."""
    settings = {
        name: getattr(options, name) for name in ("device", "minutes", "baseline", "kernel", "stored", "solver")
    }
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": command_line(),
        "settings": {**settings, "parts": list(options.parts)},
        "environment": None,
        "parts": {},
    }
    end = time.monotonic() + options.minutes * 60 - min(MARGIN, options.minutes * 6)
    left = list(options.parts)
    with TemporaryDirectory(prefix="benchmarks-gpu-") as folder:
        while left:
            shares = [PARTS[one].seconds if options.device == "cuda" else PARTS[one].seconds_on_cpu for one in left]
            share = shares[0] / sum(shares)
            limit = max(0.0, end - time.monotonic()) * share
            number = left.pop(0)
            print(f"part {number}: {PARTS[number].title}, at most {limit:.0f} s ...", flush=True)
            earlier = {name: part["results"] for name, part in found["parts"].items()}
            part = run_part(number, {**settings, "earlier": earlier}, limit, Path(folder))
            found["environment"] = found["environment"] or part.pop("environment", None)
            found["parts"][str(number)] = part
            print(f"part {number}: {part['status']} after {part['seconds']:.0f} s", part.get("error", ""), flush=True)
            if options.output is not None:
                save(options.output, found)
    return found


def run_part(number: int, settings: dict[str, Any], limit: float, folder: Path) -> dict[str, Any]:
    """Run a part in a process of its own, which is ended with all its children at the limit, in seconds.

    Returns:
        `title`, `limit` and `seconds`; `status`: ok, partial (some cases failed), failed, or out of time; `error`, its
        last line, and `log`, the end of what it printed, unless ok; `results`, and `environment` if it told one.
    """
    path, log = folder / f"part{number}.json", folder / f"part{number}.log"
    start = time.monotonic()
    deadline = time.time() + limit - min(WARNING, limit / 10)
    told = folder / f"part{number}.settings.json"
    save(told, {**settings, "call": PARTS[number].call, "deadline": deadline, "output": str(path)})
    command = [sys.executable, "-m", "benchmarks.gpu", str(told)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if PARTS[number].interpreted and settings["device"] == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results = kept.get("results", {})
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    part: dict[str, Any] = {"title": PARTS[number].title, "limit": limit, "seconds": time.monotonic() - start}
    if code == 0:
        failed = [name for name, value in results.items() if isinstance(value, dict) and "error" in value]
        part["status"] = "partial" if failed else "ok"
        if failed:
            part["error"] = f"{', '.join(failed)}: see there"
    else:
        part["status"] = "out of time" if code is None else "failed"
        part["error"] = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    if part["status"] != "ok":
        part["log"] = lines[-60:]
    return {**part, "environment": kept.get("environment"), "results": results}


def _folder(text: str) -> str:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder; python -m benchmarks.gpu.compiled {text} makes it.")
    return str(Path(text).resolve())


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) if number.strip().isdigit() else -1 for number in text.split(","))
    if not set(numbers) <= set(PARTS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {','.join(map(str, PARTS))}, such as 0,4.")
    return tuple(sorted(set(numbers)))
