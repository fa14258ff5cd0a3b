"""The options of `export`, and which of them go together."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dino_lightning.cli.checkpoints import HELP
from dino_lightning.cli.command import PROGRAM, CommandParser
from dino_lightning.export import DEFAULT_OPSET, OPSETS, RESIZING_OPSET

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

--precision int8: convolutions and products with weights in 8 bits; the ranges of activations are those of up to 32
validation images. --format openvino needs nncf for it. --precision fp16, of ONNX files: the same in 16 bits; for
OpenVINO, weights stored in 16 bits. Inputs, outputs, coordinates and boxes stay in float32. AP, AP50 and F1 of the
validation split and the latency, before and after, are printed and stored in the metadata. A loss of more than half a
point of F1 is refused, unless --accept-loss is given. The images are those of --data.root, or of the run's own dataset.

--format openvino: a .xml file and its weights in a .bin file beside it, with the same inputs, outputs and metadata;
preprocessing inside with --static only, since OpenVINO resizes in another way than training does.
--format torch: a .pt2 file for torch.export.load, its preprocessing outside.
--format directory: a model directory as a SageMaker job leaves it: model.ckpt, model.json, and the code to serve it.
"""


@dataclass(frozen=True)
class ExportOptions:
    """What `export` was asked for.

    Attributes:
        ckpt_path: what is exported, as it was given.
        output: the file or folder; None for one named after the checkpoint, here.
        format: a key of `SUFFIXES`, or "directory".
        preprocessing: "inside" or "outside".
        opset: the ONNX operator set.
        static: (height, width) of images, of which there is one; None to leave batch and sizes open.
        precision: of `PRECISIONS`, or None for float32.
        root: the dataset folder of the validation images; None for that of the run.
        accept_loss: write it whatever it loses.
    """

    ckpt_path: str
    output: Path | None
    format: str
    preprocessing: str
    opset: int
    static: tuple[int, int] | None
    precision: str | None
    root: str | None
    accept_loss: bool


def export_options(args: Sequence[str]) -> ExportOptions:
    """The options in command-line arguments.

    Raises:
        argparse.ArgumentError: some are wrong, or do not go together.
    """
    parser = _parser()
    given = parser.parse_args(args)
    preprocessing, static = _preprocessing(parser, given), _static(parser, given)
    _check_precision(parser, given)
    found = {**vars(given), "preprocessing": preprocessing, "static": static, "opset": given.opset or DEFAULT_OPSET}
    return ExportOptions(**found)


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
