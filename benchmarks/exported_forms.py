"""The forms that `export` writes of a detector, as functions to time on the CPU; files are kept and taken again."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

from torch import Tensor

from dino_lightning.export.check import compare_with_module, drawn
from dino_lightning.export.exported_model import Run
from dino_lightning.export.fewer_bits import write_int8
from dino_lightning.export.formats import describe_module, write_onnx, write_torch
from dino_lightning.export.onnx_model import run_onnx
from dino_lightning.export.openvino_int8 import write_openvino_int8
from dino_lightning.export.openvino_model import run_openvino, write_openvino
from dino_lightning.export.torch_model import run_torch
from dino_lightning.training.module import DINOModule

FORMS = {
    "torch": "torch.export, sizes open",
    "onnx": "ONNX Runtime, sizes open",
    "onnx_static": "ONNX Runtime, size fixed",
    "openvino": "OpenVINO float32, size fixed",
    "int8": "ONNX Runtime int8, size fixed",
    "openvino_int8": "OpenVINO int8, size fixed",
}
NEEDED = {"openvino": ("openvino",), "openvino_int8": ("openvino", "nncf")}  # packages
SMALL_BATCH = tuple(
    FORMS[form] for form in ("onnx_static", "openvino", "int8", "openvino_int8")
)  # of one image as it is, uint8
CALIBRATION_IMAGES = 4  # drawn ones: how long 8 bits take does not depend on the ranges


def export_forms(
    module: DINOModule, size: tuple[int, int], folder: Path, forms: Sequence[str], int8: Path | None = None
) -> dict[str, Run]:
    """Functions of exported files by their names in `FORMS`, in float32 with as many threads as PyTorch has.

    Those in `SMALL_BATCH` take (1, 3, H, W) uint8, the others what `TraceableDetector` takes.

    Args:
        module: on the CPU.
        size: (height, width) of the forms of fixed size.
        folder: for the files; those that are there are taken.
        forms: keys of `FORMS`; others are ignored, as are those whose packages in `NEEDED` are not installed.
        int8: a file to take for that form.

    Raises:
        SystemExit: files in the folder are those of other weights.
    """
    missing = {form for form, names in NEEDED.items() for name in names if importlib.util.find_spec(name) is None}
    wanted = [form for form in FORMS if form in forms and form not in missing]
    if wanted:
        _check_weights(module, folder)
    fixed = f"{size[0]}x{size[1]}"
    static = folder / f"{fixed}.onnx"

    def of(path: Path, write: Callable[[Path], object]) -> Path:
        if not path.exists():
            temporary = path.with_stem(f"unfinished_{path.stem}")
            write(temporary)
            if path.suffix == ".xml":
                temporary.with_suffix(".bin").replace(path.with_suffix(".bin"))
            temporary.replace(path)
        return path

    def fixed_file() -> Path:
        return of(static, lambda path: write_onnx(module, path, describe_module(module, "inside", size)))

    def openvino_file() -> Path:
        return of(folder / f"{fixed}.xml", lambda path: write_openvino(fixed_file(), path, {}))

    def openvino_int8(path: Path) -> None:
        write_openvino_int8(openvino_file(), path, _calibration(size))

    open_sizes = describe_module(module, "outside")
    opened: dict[str, Callable[[], Run]] = {
        "torch": lambda: run_torch(of(folder / "open.pt2", lambda path: write_torch(module, path, open_sizes))),
        "onnx": lambda: run_onnx(of(folder / "open.onnx", lambda path: write_onnx(module, path, open_sizes))),
        "onnx_static": lambda: run_onnx(fixed_file()),
        "openvino": lambda: run_openvino(openvino_file()),
        "int8": lambda: run_onnx(
            int8 or of(folder / f"{fixed}_int8.onnx", lambda path: write_int8(fixed_file(), path, _calibration(size)))
        ),
        "openvino_int8": lambda: run_openvino(of(folder / f"{fixed}_int8.xml", openvino_int8)),
    }
    return {FORMS[form]: opened[form]() for form in wanted}


def _calibration(size: tuple[int, int]) -> list[tuple[Tensor, ...]]:
    return [(drawn(*size, seed=seed)[None],) for seed in range(CALIBRATION_IMAGES)]


def _check_weights(module: DINOModule, folder: Path) -> None:
    """Note in a folder which weights its files have.

    Raises:
        SystemExit: they are others.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "weights.sha256"
    if not note.exists():
        note.write_text(f"{digest.hexdigest()}\n", encoding="utf-8")
    elif note.read_text(encoding="utf-8").strip() != digest.hexdigest():
        raise SystemExit(f"{folder} has files of other weights; give an empty folder as --exports.")


def agreement(module: DINOModule, size: tuple[int, int], exported: Mapping[str, Run]) -> list[tuple[str, ...]]:
    """How far what each form finds in a drawn image is from what the module finds, from the same proposals.

    Returns:
        Rows of name, detections compared, largest difference of a corner and of a score, and queries exchanged.
    """
    image = drawn(*size, seed=100)
    rows = []
    with patch.dict(module.hparams, {"image_size": min(size), "max_size": max(size), "stretch_to": None}):
        for name, detect in exported.items():

            def found(*inputs: Tensor, name: str = name, detect: Run = detect) -> tuple[Tensor, ...]:
                return detect(image[None]) if name in SMALL_BATCH else detect(*inputs)

            (row,) = compare_with_module(module, found, batches=[[image]])
            rows.append((name, str(row.detections), f"{row.boxes:.1e} px", f"{row.scores:.1e}", str(row.exchanged)))
    return rows
