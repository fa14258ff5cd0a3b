"""What kernels of several folders share: where they can run, how one is tried before it is used, and launched."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dino_lightning.console import say, shown
from dino_lightning.files import atomic_write

OLDEST_CAPABILITY = (8, 0)  # of a CUDA device, for kernels
SECONDS_OF_SILENCE = 2.0  # a trial that finds its kernels in Triton's cache takes less
SECONDS_FOR_A_PROCESS = 300
_said_that_it_compiles = False


def missing(device_type: str, device_index: int) -> str | None:
    """Why no kernel can run on a device, as far as that can be known without running one; None if one can.

    Args:
        device_type: of PyTorch, such as `cuda`; on a `cpu` Triton can only interpret.
        device_index: of the CUDA device.
    """
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a CUDA device, or on a CPU TRITON_INTERPRET=1 in the environment before the start"
    if device_type not in ("cpu", "cuda"):
        return f"there is no kernel for device type {device_type}"
    if device_type == "cuda" and torch.version.cuda is None:
        return "it is written for NVIDIA devices"
    if device_type == "cuda" and torch.cuda.get_device_capability(device_index) < OLDEST_CAPABILITY:
        return f"the device is older than compute capability {'.'.join(map(str, OLDEST_CAPABILITY))}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def in_use(
    implementation: str,
    device: torch.device,
    found: Mapping[Any, str | None],
    *,
    kernel: str = "Triton kernel",
    plain: str = "PyTorch",
) -> str:
    """Which implementation has run on a device in this process, and why where it fell back, on one line.

    Args:
        implementation: "auto", "pytorch" or the name of a kernel.
        device: of the model.
        found: what trials have said, by call; type and index of the device are the first two parts of a call.
        kernel: what is said to have run where a trial was passed.
        plain: what is said to have run where none was.
    """
    if implementation == "pytorch":
        return "PyTorch (as chosen)"
    if implementation == "auto" and device.type != "cuda":
        return "PyTorch"
    if implementation == "auto" and torch.are_deterministic_algorithms_enabled():
        return "PyTorch (deterministic algorithms were asked for)"
    passed, reasons = trials_on(device, found)
    if not passed and not reasons:
        return "not known yet"
    if not passed:
        return f"{plain} ({reasons})"
    return f"{kernel}, for some calls PyTorch ({reasons})" if reasons else kernel


def trials_on(device: torch.device, found: Mapping[Any, str | None]) -> tuple[bool, str]:
    """Whether a trial on the device was passed, and what the others have said, on one line; empty if nothing.

    Args:
        device: of the model.
        found: as in `in_use`.
    """
    troubles = {trouble for call, trouble in found.items() if call[:2] == (device.type, device.index or 0)}
    said = sorted(shown(" ".join(trouble.split()), 300) for trouble in troubles if trouble is not None)
    return None in troubles, "; ".join(said)


def launches_on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes a CUDA device the current one: kernels are launched there, whatever device the tensors lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def in_a_thread(trial: Callable[[], str | None]) -> str | None:
    """What a trial says is wrong, or what it raised; None if nothing.

    A fault that may pass, of memory or of the files of Triton's cache, has a second chance. Who waits for the compiler
    is told, once in a process.

    Args:
        trial: compiles and runs a kernel; runs in a thread of its own, so that a caller's autocast, inference mode or
            tracing does not reach it.
    """
    watch = threading.Timer(SECONDS_OF_SILENCE, say_that_it_compiles)
    watch.daemon = True
    watch.start()
    try:
        trouble, may_pass = _once(trial)
        if may_pass:
            torch.cuda.empty_cache()
            trouble, may_pass = _once(trial)
            trouble = f"{trouble}; tried twice" if may_pass else trouble
        return trouble
    finally:
        watch.cancel()


def in_a_process(module: str, argument: str, mark: Path) -> str | None:
    """What a trial in a process of its own says is wrong; None if nothing.

    After a wrong access to memory a process can use its device no more. A kernel that has never run on such a device is
    therefore tried apart first; that it passed is kept on the disk.

    Args:
        module: run as `python -m MODULE ARGUMENT`; ends with 0, or says on its last line what is wrong.
        argument: what the kernel is compiled for.
        mark: the file that says that the trial has been passed; one that cannot be written costs a trial, no more.

    Raises:
        OSError: no process can be started.
    """
    if mark.is_file():
        return None
    place = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC_", "LIGHTNING_"))}
    place["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    command = [sys.executable, "-m", module, argument]
    try:
        ended = subprocess.run(command, env=place, capture_output=True, text=True, timeout=SECONDS_FOR_A_PROCESS)
    except subprocess.TimeoutExpired:
        return f"its trial took more than {SECONDS_FOR_A_PROCESS} seconds"
    if ended.returncode < 0:
        return f"the process of its trial was ended by {signal.Signals(-ended.returncode).name}"
    if ended.returncode > 0:
        lines = (ended.stdout.strip() or ended.stderr.strip() or "its trial failed").splitlines()
        return lines[-1]
    with contextlib.suppress(OSError), atomic_write(mark) as temporary:
        temporary.write_text("passed\n", encoding="utf-8")
    return None


def _once(trial: Callable[[], str | None]) -> tuple[str | None, bool]:
    """What a trial says, or what it raises and whether that may pass."""
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(trial).result(), False
    except Exception as error:  # whatever a compiler, a driver or a device can raise
        of_memory = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)  # the driver's own words
        return f"{type(error).__name__}: {error}", of_memory or isinstance(error, OSError)


def say_that_it_compiles() -> None:
    """Tell who waits for the compiler; once in a process."""
    global _said_that_it_compiles
    if not _said_that_it_compiles:
        _said_that_it_compiles = True
        say("Compiling kernels for this GPU: about 15 seconds the first time ...", sys.stderr)


def allowed_to_wait(device_index: int, trial: Callable[[], str | None]) -> str | None:
    """Run a trial that synchronises with the device, whatever the caller has made of synchronisations.

    Args:
        device_index: the CUDA device of this thread from now on; no other one is touched.
        trial: returns what is wrong.
    """
    torch.cuda.set_device(device_index)
    mode = torch.cuda.get_sync_debug_mode()
    if mode == 0:  # the default; to set it, even to what it is, warns
        return trial()
    _set_sync_debug_mode(0)
    try:
        return trial()
    finally:
        _set_sync_debug_mode(mode)


def _set_sync_debug_mode(mode: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)
