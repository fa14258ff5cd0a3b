"""The command `export`: a trained model as ONNX, for `torch.export`, or as a model directory; checked by running it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dino_lightning.cli.checkpoints import model_file, refuse_exported
from dino_lightning.cli.command import plain_warnings, run_command, writing
from dino_lightning.cli.export_options import SUFFIXES, export_options
from dino_lightning.console import say
from dino_lightning.errors import UsageError
from dino_lightning.export import DEFAULT_OPSET
from dino_lightning.files import atomic_write

if TYPE_CHECKING:
    from dino_lightning.export.check import Compared
    from dino_lightning.training.module import DINOModule

NAMES = {"onnx": "an ONNX file", "openvino": "a file for OpenVINO", "torch": "a file for torch.export.load"}


def run(args: Sequence[str]) -> int:
    """Export; returns the exit code."""

    def action() -> int:
        options = export_options(args)
        checkpoint = model_file(options.ckpt_path)
        refuse_exported(checkpoint, "give the checkpoint that it came from.")
        if options.format == "directory":
            output = options.output or Path("model")
            with writing(output, "--output"):
                _export_directory(checkpoint, output)
        else:
            output = _file(options.output, checkpoint, SUFFIXES[options.format])
            settings = (options.format, options.preprocessing, options.opset, options.static)
            with writing(output, "--output"):
                if options.precision is None:
                    export_file(checkpoint, output, *settings)
                else:
                    precision, root, accept_loss = options.precision, options.root, options.accept_loss
                    export_fewer_bits(
                        checkpoint, output, *settings, precision=precision, root=root, accept_loss=accept_loss
                    )
        print(output)
        return 0

    return run_command(action)


def _file(output: Path | None, checkpoint: Path, suffix: str) -> Path:
    name = f"{checkpoint.stem}{suffix}"
    if output is None:
        return Path(name)
    if output.is_dir() or not output.suffix:
        return output / name
    if output.suffix != suffix:
        raise UsageError(f"--output {output} must end in {suffix}, or be a folder.")
    return output


def export_file(
    checkpoint: Path,
    output: Path,
    kind: str = "onnx",
    preprocessing: str = "inside",
    opset: int = DEFAULT_OPSET,
    static: tuple[int, int] | None = None,
) -> None:
    """Write a checkpoint as a file that others can run, compare the two, and print how far they agree.

    Args:
        checkpoint: one of ours.
        output: the file; written only if it agrees with the checkpoint.
        kind: "onnx", "openvino" or "torch".
        preprocessing: "inside" or "outside", see `export`.
        opset: the ONNX operator set, of `OPSETS`.
        static: (height, width) of images, of which there is one; None to leave batch and sizes open.

    Raises:
        UsageError: they do not agree, or a package is missing.
        CheckpointError: not a checkpoint of ours.
    """
    from dino_lightning.inference.detector import load_module  # imports PyTorch

    module = load_module(checkpoint)
    with _written_in_full(output, kind) as temporary:
        _write_checked(module, output, temporary, kind, preprocessing, opset, static)


def export_fewer_bits(
    checkpoint: Path,
    output: Path,
    kind: str = "onnx",
    preprocessing: str = "inside",
    opset: int = DEFAULT_OPSET,
    static: tuple[int, int] | None = None,
    *,
    precision: str,
    root: str | None = None,
    accept_loss: bool = False,
) -> None:
    """As `export_file`, in a lower precision; prints accuracy and latency before and after, and stores them in it.

    Args:
        checkpoint: one of ours.
        output: the file; written only if it loses no more than half a point of F1.
        kind: "onnx" or "openvino".
        preprocessing: see `export_file`.
        opset: see there.
        static: see there.
        precision: "fp16" or "int8".
        root: the dataset folder of the validation images; by default that of the run, by the checkpoint's options.
        accept_loss: write it whatever it loses.

    Raises:
        UsageError: it loses more; what it was made of does not agree with the checkpoint; there are no validation
            images, or their classes are others; or a package is missing.
        CheckpointError: not a checkpoint of ours.
        DataError: something is wrong with the dataset.
    """
    from dino_lightning.cli.validation_images import validation_images
    from dino_lightning.export.fewer_bits import LARGEST_LOSS, loss_of, table, write_fewer_bits
    from dino_lightning.export.formats import describe_module
    from dino_lightning.export.openvino_int8 import require_nncf
    from dino_lightning.export.openvino_model import require_openvino
    from dino_lightning.inference.detector import load_module

    if kind == "openvino":
        require_openvino()
        if precision == "int8":
            require_nncf()
    module = load_module(checkpoint)
    with plain_warnings():
        images = validation_images(checkpoint, module, root)
    with _written_in_full(output, kind) as temporary, tempfile.TemporaryDirectory() as folder:
        onnx_file = Path(folder) / "float32.onnx"
        _write_checked(module, output, onnx_file, "onnx", preprocessing, opset, static)
        description = describe_module(module, preprocessing, static)
        measured = write_fewer_bits(onnx_file, temporary, kind, precision, description, images)
        print(table(measured, len(images)), flush=True)
        if (loss := loss_of(measured, precision)) > LARGEST_LOSS and not accept_loss:
            raise UsageError(
                f"{output} is not written: {precision} loses {100 * loss:.2f} points of F1 on {len(images)} validation "
                f"images, more than {100 * LARGEST_LOSS:g}; add --accept-loss to write it nevertheless."
            )


@contextmanager
def _written_in_full(output: Path, kind: str) -> Iterator[Path]:
    """A temporary file that becomes `output` in the end, for OpenVINO with its weights beside it; or neither does."""
    weights = output.with_suffix(".bin") if kind == "openvino" else None
    placed = False
    try:
        with atomic_write(output) as temporary:
            written = temporary.with_suffix(".bin")
            try:
                yield temporary
                if weights is not None:
                    written.replace(weights)
                    placed = True
            finally:
                written.unlink(missing_ok=True)
    except BaseException:
        if placed and weights is not None:  # the other half did not get its name
            weights.unlink(missing_ok=True)
        raise


def _write_checked(
    module: DINOModule,
    output: Path,
    temporary: Path,
    kind: str,
    preprocessing: str,
    opset: int,
    static: tuple[int, int] | None,
) -> None:
    """Write a file in float32 that will be `output`, compare it with its module, and print how far they agree.

    Raises:
        UsageError: they do not, or a package is missing.
    """
    from dino_lightning.export.check import compare_with_module, table
    from dino_lightning.export.exported_model import ImageRule
    from dino_lightning.export.formats import describe_module, write_and_run

    description = describe_module(module, preprocessing, static)
    rule = ImageRule(**{field.name: description[field.name] for field in fields(ImageRule)})
    say(f"Tracing the detector and writing it as {NAMES[kind]} ...", sys.stderr)
    detect, prepare = write_and_run(module, temporary, kind, description, opset)
    say("Running it beside the checkpoint ...", sys.stderr)
    rows = compare_with_module(module, detect, prepare, rule=rule)
    print(table(rows), flush=True)
    if not all(row.same for row in rows):
        raise UsageError(_disagreement(output, rows))


def _disagreement(output: Path, rows: Sequence[Compared]) -> str:
    return (
        f"{output} is not written: what was exported does not agree with the checkpoint (boxes differ by up to "
        f"{max(row.boxes for row in rows):.3g} pixels, scores by up to {max(row.scores for row in rows):.2g})."
    )


def _export_directory(checkpoint: Path, output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists already; give another --output.")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        fill_model_directory(checkpoint, temporary)
        temporary.chmod(0o755)
        if output.exists():
            output.rmdir()
        temporary.replace(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def fill_model_directory(checkpoint: Path, folder: Path) -> None:
    """Write a checkpoint's model directory into an empty folder, with the results of its run; and read it again.

    Raises:
        UsageError: other weights were read than written.
    """
    import torch  # takes seconds

    from dino_lightning.cli.stored_options import run_folder_of
    from dino_lightning.export.model_directory import MODEL_FILE, is_model_directory, write_model_directory
    from dino_lightning.export.package_code import serving_code
    from dino_lightning.inference.detector import load_module

    # files of these names that lie beside a checkpoint by chance may be anything, and the directory is made to be sent
    run_dir = checkpoint.parent if is_model_directory(checkpoint.parent) else run_folder_of(checkpoint)
    say("Writing the weights and the code that serves them, and reading them again ...", sys.stderr)
    module = load_module(checkpoint)
    write_model_directory(checkpoint, run_dir, folder, serving_code(module.hparams["backbone"]), complete=True)
    before, after = module.state_dict(), load_module(folder / MODEL_FILE).state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise UsageError(f"Nothing is written: the weights in the model directory are not those of {checkpoint}.")
