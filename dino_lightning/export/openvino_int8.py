"""A detector for OpenVINO in 8 bits, by nncf's quantization after training."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from dino_lightning.errors import UsageError
from dino_lightning.export.openvino_model import require_openvino
from dino_lightning.export.signal_stack import signal_stack_kept

QUANTIZED = ("Convolution", "GroupConvolution", "MatMul")
MISSING = '--precision int8 of --format openvino needs nncf: pip install "dino-lightning[openvino-int8]".'


def require_nncf() -> Any:
    """The package, which sends nothing home: told so when it is imported.

    Raises:
        UsageError: it is not installed.
    """
    try:
        with patch.dict(os.environ, {"NNCF_CI": "1"}):
            import nncf
    except ImportError as error:
        raise UsageError(MISSING) from error
    return nncf


def write_openvino_int8(source: Path, path: Path, inputs: Iterable[tuple[Tensor, ...]]) -> None:
    """Write a .xml file with convolutions and products with weights in 8 bits.

    All else stays in float32: sums and products of activations in 8 bits lose accuracy (benchmarks/RESULTS.md).

    Args:
        source: a .xml file in float32, of `write_openvino`.
        path: the file to write, with its weights beside it; its metadata is that of the source.
        inputs: what the file is given, for some images; of these, activations get their ranges.

    Raises:
        UsageError: a package is missing.
    """
    openvino, nncf = require_openvino(), require_nncf()
    model = openvino.Core().read_model(str(source))
    given = [tuple(value.numpy() for value in values) for values in inputs]
    operations = model.get_ops()
    left = nncf.IgnoredScope(
        types=sorted({operation.get_type_name() for operation in operations}.difference(QUANTIZED)),
        names=[operation.get_friendly_name() for operation in operations if _is_of_activations(operation)],
        validate=False,  # not all of these types are known to it
    )
    with signal_stack_kept(), redirect_stdout(io.StringIO()):  # its progress
        quantized = nncf.quantize(
            model,
            nncf.Dataset(given),
            subset_size=len(given),
            preset=nncf.QuantizationPreset.MIXED,
            ignored_scope=left,
        )
    openvino.save_model(quantized, str(path), compress_to_fp16=False)


def _is_of_activations(operation: Any) -> bool:
    """Whether it is a product of two tensors of which none is stored in the file."""
    factors = [value.get_source_output().get_node().get_type_name() for value in operation.inputs()]
    return operation.get_type_name() == "MatMul" and "Constant" not in factors
