"""A detector for OpenVINO: a .xml file with its weights in a .bin file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lightning.errors import CheckpointError, UsageError
from dino_lightning.export.exported_model import OUTPUTS, STORED, ExportedModel, Run
from dino_lightning.export.signal_stack import signal_stack_kept

SECTION = "dino_lightning"  # of the file's metadata, which OpenVINO calls runtime information
MISSING = 'OpenVINO is not installed: pip install "dino-lightning[openvino]".'
# OpenVINO's own names. Left to itself it takes bfloat16 where the processor has it, which moves scores by 0.03.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class OpenVinoModel(ExportedModel):
    """A detector in a .xml file with its .bin beside it, run by OpenVINO; see `ExportedModel`.

    Args:
        path: the .xml file.
        provider: the device in OpenVINO's words: "CPU", "GPU", "AUTO" and others.
        precision: what it computes in, a key of `PRECISIONS`.

    Raises:
        CheckpointError: a file is missing or damaged, or `export` did not write it; OpenVINO has no such device; or it
            is not installed.
        ValueError: another precision.
    """

    def __init__(self, path: str | Path, *, provider: str = "CPU", precision: str = "float32") -> None:
        model = _read(Path(path))
        there = [name for name in STORED if model.has_rt_info([SECTION, name])]
        stored = {name: model.get_rt_info([SECTION, name]).astype(str) for name in there}
        super().__init__(path, _function(model, path, provider, precision), stored)


def run_openvino(path: Path) -> Run:
    """The function in a .xml file, computed on the CPU in float32."""
    return _function(_read(path), path, "CPU", "float32")


def require_openvino() -> Any:
    """The package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UsageError(MISSING) from error
    return openvino


def write_openvino(onnx_file: Path, path: Path, stored: Mapping[str, str], *, half: bool = False) -> None:
    """Write an ONNX file as .xml, with its weights in a .bin file beside it; `half` stores those of float32 as float16.

    Raises:
        UsageError: OpenVINO is not installed.
    """
    _save(require_openvino().convert_model(str(onnx_file)), path, stored, half)


def copy_openvino(source: Path, path: Path, stored: Mapping[str, str]) -> None:
    """Write a .xml file again, with other metadata."""
    _save(require_openvino().Core().read_model(str(source)), path, stored, half=False)


def _save(model: Any, path: Path, stored: Mapping[str, str], half: bool) -> None:
    for name, value in stored.items():
        model.set_rt_info(value, [SECTION, name])
    require_openvino().save_model(model, str(path), compress_to_fp16=half)


def _read(path: Path) -> Any:
    try:
        import openvino
    except ImportError as error:
        raise CheckpointError(f"{path}: {MISSING}") from error
    for file in (path, path.with_suffix(".bin")):
        if not file.is_file():
            raise CheckpointError(
                f"{file} does not exist; a model for OpenVINO is a .xml file with its .bin beside it."
            )
    try:
        return openvino.Core().read_model(str(path))
    except Exception as error:  # OpenVINO raises RuntimeError, and what its readers do
        raise CheckpointError(f"{path} cannot be read by OpenVINO ({_reason(error)}).") from error


def _function(model: Any, path: str | Path, provider: str, precision: str) -> Run:
    import openvino

    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision]}
    if provider.startswith("CPU"):
        settings["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    with signal_stack_kept():
        core = openvino.Core()
        try:
            compiled = core.compile_model(model, provider, settings)
        except Exception as error:  # as above
            there = ", ".join(core.available_devices)
            raise CheckpointError(
                f"{path} cannot be run by OpenVINO on {provider} ({_reason(error)}); it has {there}."
            ) from error

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = compiled([value.contiguous().numpy() for value in inputs])
        return tuple(torch.from_numpy(found[name].copy()) for name in OUTPUTS)

    return run


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__
