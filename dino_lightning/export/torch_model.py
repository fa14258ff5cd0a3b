"""An exported .pt2 file, run by `torch.export`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._sympy.value_ranges import ValueRanges

from dino_lightning.errors import CheckpointError
from dino_lightning.export.exported_model import DESCRIPTION_FILE, ExportedModel, Run, stored_text


class TorchModel(ExportedModel):
    """A detector in a .pt2 file; see `ExportedModel`.

    Args:
        path: the file.
        device: where to compute.

    Raises:
        CheckpointError: no such file, a damaged one, or one that `export` did not write.
    """

    def __init__(self, path: str | Path, *, device: torch.device | str = "cpu") -> None:
        run, text = _load(Path(path), device)
        try:
            stored = stored_text(json.loads(text)) if text else {}
        except ValueError:
            stored = {}
        super().__init__(path, run, stored)


def run_torch(path: Path) -> Run:
    """The function in a .pt2 file, on the CPU."""
    return _load(path, "cpu")[0]


def _of_any_size(program: torch.export.ExportedProgram) -> Callable[..., Any]:
    """The function of a program, for images narrower than two cells of the coarsest level as well.

    The graph is right for them, but PyTorch notes while tracing that no size of a map was 1, and refuses others.
    """
    for symbol, values in program.range_constraints.items():
        program.range_constraints[symbol] = ValueRanges(1, values.upper)
    named = "check_guards" in inspect.signature(program.module).parameters  # since torch 2.9
    function: Callable[..., Any] = program.module(check_guards=False) if named else program.module()
    return function


def _load(path: Path, device: torch.device | str) -> tuple[Run, str]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    extra = {DESCRIPTION_FILE: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # damaged archives raise anything
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".") or type(error).__name__
        raise CheckpointError(f"{path} is not a file of torch.export, or it is damaged ({reason}).") from error
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    function = _of_any_size(program)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(function(*(value.to(device) for value in inputs)))

    return run, extra[DESCRIPTION_FILE]
