"""The command `export`: a trained model as ONNX, for `torch.export`, or as a model directory; checked by running it."""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from dino_lightning.cli.checkpoints import HELP, model_file, refuse_exported
from dino_lightning.cli.command import PROGRAM, CommandParser, run_command, writing
from dino_lightning.errors import UsageError
from dino_lightning.export import DEFAULT_OPSET, OPSETS, RESIZING_OPSET
from dino_lightning.files import atomic_write

if TYPE_CHECKING:
    from dino_lightning.export.check import Compared
    from dino_lightning.training.module import DINOModule

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
SMALLEST, LARGEST = 32, 4096  # sides of images of fixed size, in pixels
PRECISIONS = ("fp16", "int8")
DESCRIPTION = """Write a trained model in a form that others can run. The file gets its name only after it has been run
beside the checkpoint, on several sizes of images and batches, and found the same: boxes within 0.5 pixels, scores
within 0.001, from the same resized pixels and the same proposals (some, of nearly the same score, change places).

--format onnx, the default, with batch size, height and width left open. Outputs: boxes (B, N, 4), corners x1, y1, x2,
y2 in pixels of the original image, not clipped to it; scores (B, N); labels (B, N), places in class_names; tokens
(B, Q), the proposals that the queries came from. Its metadata has class_names, category_ids, score_threshold and what
the images must look like. With --preprocessing

  inside   one input: images (B, 3, H, W) uint8, RGB 0-255, all of one size, as they are. They are resized by the rule
           of evaluation and normalised inside. The simplest to use. Some resized pixels are rounded the other way than
           in Python, by 1 of 255; scores can differ by a few thousandths from those of the checkpoint for that.
  outside  three inputs: images (B, 3, H, W) float32: resized, each top left in a common canvas of black pixels, then
           normalised by the mean and std of the metadata; image_sizes (B, 2) and original_sizes (B, 2) int64, height
           and width before padding and before resizing. For batches of images of different sizes.

--static HEIGHTxWIDTH, such as 640x640, with either: batch 1 and that size, for runtimes that want fixed shapes; what
only constants decide is computed when the file is written. Nothing is resized inside then. With --preprocessing

  inside   one input: images (1, 3, HEIGHT, WIDTH) uint8, RGB 0-255: the image, stretched to that size. Boxes are in
           its pixels. A model that was not trained with stretched images gives other boxes than its checkpoint then.
  outside  the three inputs as above, of batch 1: the image keeps its proportions, top left in the canvas.

--opset 16 or 17 go with --static or with --preprocessing outside: resizing inside needs 18.

--precision int8, of ONNX files: convolutions and products with weights in 8 bits; the ranges of activations are those
of up to 32 validation images. --precision fp16, of ONNX files: the same in 16 bits; for OpenVINO, weights stored in 16
bits. Inputs, outputs, coordinates and boxes stay in float32. AP, AP50 and F1 of the validation split and
the latency, before and after, are printed and stored in the metadata. A loss of more than half a point of F1 is
refused, unless --accept-loss is given. The images are those of --data.root, or of the run's own dataset.

--format openvino: a .xml file and its weights in a .bin file beside it, with the same inputs, outputs and metadata;
preprocessing inside with --static only, since OpenVINO resizes in another way than training does.
--format torch: a .pt2 file for torch.export.load, its preprocessing outside.
--format directory: a model directory as a SageMaker job leaves it: model.ckpt, model.json, and the code to serve it.
"""


def run(args: Sequence[str]) -> int:
    """Export; returns the exit code."""

    def action() -> int:
        parser = _parser()
        options = parser.parse_args(args)
        preprocessing, static = _preprocessing(parser, options), _static(parser, options)
        _check_precision(parser, options)
        checkpoint = model_file(options.ckpt_path)
        refuse_exported(checkpoint, "give the checkpoint that it came from.")
        if options.format == "directory":
            output = options.output or Path("model")
            with writing(output, "--output"):
                _export_directory(checkpoint, output)
        else:
            output = _file(options.output, checkpoint, SUFFIXES[options.format])
            opset, precision = options.opset or DEFAULT_OPSET, options.precision
            with writing(output, "--output"):
                if precision is None:
                    export_file(checkpoint, output, options.format, preprocessing, opset, static)
                else:
                    export_fewer_bits(
                        checkpoint, output, options.format, preprocessing, opset, static,
                        precision=precision, root=options.root, accept_loss=options.accept_loss,
                    )  # fmt: skip
        print(output)
        return 0

    return run_command(action)


def _parser() -> CommandParser:
    parser = CommandParser(
        f"{PROGRAM} export",
        DESCRIPTION,
        epilog="Example: python -m dino_lightning export --ckpt_path last --output rooms.onnx",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, help=HELP)
    add("--output", type=Path, help="the file to write, or the folder for it (next to the checkpoint's name, here)")
    add("--format", choices=(*SUFFIXES, "directory"), default="onnx", help="what to write (onnx)")
    add("--preprocessing", choices=("inside", "outside"), help="see above (inside where nothing or ONNX resizes)")
    add("--static", metavar="HEIGHTxWIDTH", help="fix batch 1 and the size of images, such as 640x640 (left open)")
    add("--opset", type=int, help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} ({DEFAULT_OPSET})")
    add("--precision", choices=PRECISIONS, help="products in 16 or 8 bits, with accuracy before and after (float32)")
    add("--data.root", dest="root", metavar="DIR", help="dataset whose validation images --precision uses (the run's)")
    add("--accept-loss", action="store_true", help="write it even if it loses more than half a point of F1")
    return parser


def _check_precision(parser: CommandParser, options: argparse.Namespace) -> None:
    if options.precision is not None and options.format in ("torch", "directory"):
        parser.error(f"--precision is for onnx and openvino; --format {options.format} has the weights as trained.")
    if options.precision == "int8" and options.format == "openvino":
        parser.error("--precision int8 is for onnx; --format openvino takes fp16 only.")
    if options.precision is None and (options.root is not None or options.accept_loss):
        parser.error("--data.root and --accept-loss go with --precision; an export without it needs no images.")


def _preprocessing(parser: CommandParser, options: argparse.Namespace) -> str:
    """Where images are prepared.

    Raises:
        argparse.ArgumentError: options that do not go together.
    """
    if options.format == "directory" and options.preprocessing is not None:
        parser.error("--preprocessing is for files; a model directory has the checkpoint, which prepares its images.")
    if options.format == "torch" and options.preprocessing == "inside":
        parser.error("--preprocessing inside is for onnx and openvino; a .pt2 file takes normalised images.")
    if options.opset is not None and options.format in ("torch", "directory"):
        parser.error(f"--opset is for onnx and openvino; --format {options.format} has no ONNX operators.")
    if options.opset is not None and options.opset not in OPSETS:
        parser.error(f"--opset is {options.opset}; choose one from {OPSETS[0]} to {OPSETS[-1]}.")
    resized_outside = options.format == "openvino" and options.static is None
    preprocessing = options.preprocessing or ("outside" if options.format == "torch" or resized_outside else "inside")
    if resized_outside and preprocessing == "inside":
        parser.error(
            "--preprocessing inside is for --format openvino with --static only: OpenVINO resizes in another way than "
            "training does, and boxes would be others."
        )
    if (options.opset or DEFAULT_OPSET) < RESIZING_OPSET and preprocessing == "inside" and options.static is None:
        parser.error(
            f"--opset {options.opset} has no resizing with antialiasing; add --preprocessing outside or --static, or "
            f"choose {RESIZING_OPSET} to {OPSETS[-1]}."
        )
    return preprocessing


def _static(parser: CommandParser, options: argparse.Namespace) -> tuple[int, int] | None:
    """The (height, width) of `--static`.

    Raises:
        argparse.ArgumentError: it is none, or one that cannot be.
    """
    if options.static is None:
        return None
    if options.format in ("torch", "directory"):
        parser.error(f"--static is for onnx and openvino; --format {options.format} leaves sizes open.")
    found = re.fullmatch(r"(\d+)x(\d+)", options.static)
    if found is None:
        parser.error(f"--static is {options.static!r}; give height and width in pixels, such as 640x640.")
    height, width = int(found[1]), int(found[2])
    if not all(SMALLEST <= side <= LARGEST for side in (height, width)):
        parser.error(f"--static is {options.static}; both sides must be from {SMALLEST} to {LARGEST} pixels.")
    return height, width


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
    from dino_lightning.export.openvino_model import require_openvino
    from dino_lightning.inference.detector import load_module

    if kind == "openvino":
        require_openvino()
    module = load_module(checkpoint)
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
    detect, prepare = write_and_run(module, temporary, kind, description, opset)
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

    from dino_lightning.export.model_directory import MODEL_FILE, write_model_directory
    from dino_lightning.export.package_code import serving_code
    from dino_lightning.inference.detector import load_module

    run_dir = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    module = load_module(checkpoint)
    write_model_directory(checkpoint, run_dir, folder, serving_code(module.hparams["backbone"]), complete=True)
    before, after = module.state_dict(), load_module(folder / MODEL_FILE).state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise UsageError(f"Nothing is written: the weights in the model directory are not those of {checkpoint}.")
