"""An exported .pt2 file, run by `torch.export`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

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
    function = program.module()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(function(*(value.to(device) for value in inputs)))

    return run, extra[DESCRIPTION_FILE]
