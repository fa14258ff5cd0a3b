"""An exported ONNX file, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_lightning.errors import CheckpointError
from dino_lightning.export.exported_model import OUTPUTS, ExportedModel, Run

Provider = str | tuple[str, dict[str, Any]]  # a name, or with options, as onnxruntime takes them
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")  # best first


class OnnxModel(ExportedModel):
    """A detector in an ONNX file; see `ExportedModel`.

    Args:
        path: the file.
        providers: what onnxruntime computes with, best first, each by its name or with options as onnxruntime takes
            them; by default CUDA where it has it, else the CPU.

    Raises:
        CheckpointError: no such file, not an ONNX file, or one that `export` did not write; a provider that
            onnxruntime does not have, or cannot start; or onnxruntime is missing.
    """

    def __init__(self, path: str | Path, *, providers: Sequence[Provider] | None = None) -> None:
        session = onnxruntime_session(path, providers)
        super().__init__(path, _function(session, OUTPUTS), session.get_modelmeta().custom_metadata_map)


def run_onnx(file: Path | bytes, outputs: Sequence[str] = OUTPUTS) -> Run:
    """The function in an ONNX file, or in its content, computed by onnxruntime on the CPU."""
    return _function(onnxruntime_session(file, ["CPUExecutionProvider"]), outputs)


def _function(session: Any, outputs: Sequence[str]) -> Run:
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: value.contiguous().numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(value) for value in session.run(list(outputs), given))

    return run


def onnxruntime_session(file: str | Path | bytes, providers: Sequence[Provider] | None = None) -> Any:
    """The session of an ONNX file, given by its path or its content.

    Raises:
        CheckpointError: onnxruntime is missing, there is no such file, it is none that onnxruntime can load, or a
            provider is asked for that this onnxruntime does not have or cannot start.
    """
    name = "An ONNX file" if isinstance(file, bytes) else str(file)
    try:
        import onnxruntime
    except ImportError as error:
        raise CheckpointError(f'{name}: running it needs onnxruntime: pip install "dino-lightning[export]".') from error
    if not isinstance(file, bytes) and not Path(file).is_file():
        raise CheckpointError(f"{file} does not exist.")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors
    settings.intra_op_num_threads = torch.get_num_threads()
    there = onnxruntime.get_available_providers()
    wanted: list[Provider] = [name for name in PROVIDERS if name in there] if providers is None else list(providers)
    names = [provider if isinstance(provider, str) else provider[0] for provider in wanted]
    absent = [provider for provider in names if provider not in there]
    if absent:
        raise CheckpointError(f"{name}: onnxruntime has no provider {absent[0]} here; it has {', '.join(there)}.")
    content = file if isinstance(file, bytes) else str(file)
    try:
        session = onnxruntime.InferenceSession(content, settings, providers=wanted)
    except Exception as error:  # onnxruntime has an exception for each of its error codes, without a common base
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{name} cannot be run by onnxruntime ({reason}).") from error
    not_started = [provider for provider in names if provider not in session.get_providers()]
    if providers is not None and not_started:
        raise CheckpointError(
            f"{name}: onnxruntime could not start {not_started[0]} here, and would take "
            f"{session.get_providers()[0]} without a word; does it find the libraries of its CUDA version?"
        )
    return session
