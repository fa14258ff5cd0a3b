"""What a part finds, kept in a file that is rewritten after every case."""

from __future__ import annotations

import contextlib
import importlib
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment, save


class NotHere(Exception):
    """What is to be measured cannot be measured on this machine; the message says what it needs."""


class Report:
    """What a part has found so far, case by case.

    Attributes:
        device: "cuda" or "cpu".
        small: whether to take small sizes, whose numbers mean nothing.
        settings: `baseline`, `kernel`, `stored` and `solver` as given, and `earlier`, the results of the parts before
            by number.
        results: by the name of the case.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.device: str = settings["device"]
        self.small = self.device == "cpu"
        self.results: dict[str, Any] = {}
        self._environment = environment()
        self._save()

    @property
    def seconds_left(self) -> float:
        """Until the part should have ended."""
        left: float = self.settings["deadline"] - time.time()
        return left

    def earlier(self, number: int) -> dict[str, Any]:
        """The results of a part before this one; empty if it was not run."""
        results: dict[str, Any] = self.settings["earlier"].get(str(number), {})
        return results

    def add(self, name: str, value: Any) -> None:
        """Keep a value."""
        self.results[name] = value
        self._save()

    def attempt(self, name: str, call: Callable[[], Any], *, seconds: float = 0.0) -> Any:
        """Keep what a call returns, or why there is nothing, and carry on.

        Args:
            name: of the case.
            call: measures it; what it raises is kept as the last line of the traceback.
            seconds: that it needs; with fewer left it is skipped.

        Returns:
            What the call returned, or None.
        """
        if self.seconds_left < seconds:
            self.add(name, {"skipped": f"{seconds:.0f} s were needed, {max(0.0, self.seconds_left):.0f} s were left"})
            return None
        start = time.perf_counter()
        try:
            value = call()
        except NotHere as reason:
            self.add(name, {"not here": str(reason)})
        except Exception as error:
            traceback.print_exc()
            self.add(name, {"error": last_line(error)})
        else:
            self.add(name, value)
            print(f"{name}: {time.perf_counter() - start:.1f} s")
            return value
        print(f"{name}: {self.results[name]}")
        if self.device == "cuda":
            with contextlib.suppress(RuntimeError):  # after a fault of the device, whatever comes next says so
                torch.cuda.empty_cache()
        return None

    def need_cuda(self, what: str) -> None:
        """Raise `NotHere` on a CPU.

        Raises:
            NotHere: there is no CUDA device.
        """
        if self.device != "cuda":
            raise NotHere(f"{what} needs a CUDA device")

    def _save(self) -> None:
        save(Path(self.settings["output"]), {"environment": self._environment, "results": self.results})


def last_line(error: BaseException) -> str:
    """The last line of its traceback, which names the kind and the message, at most 400 characters."""
    return traceback.format_exception_only(error)[-1].strip().replace("\n", " ")[:400]


def by_reference(reference: str) -> Any:
    """What `module:attribute` names.

    Raises:
        SystemExit: there is no such attribute, or the text is no reference.
        ImportError: there is no such module.
    """
    module, colon, attribute = reference.partition(":")
    if not colon:
        raise SystemExit(f"{reference!r} must be module:callable, such as mine.kernels:backward.")
    found = importlib.import_module(module)
    if not hasattr(found, attribute):
        raise SystemExit(f"{module} has no {attribute}.")
    return getattr(found, attribute)
