"""The command `export`: a trained model as ONNX, for `torch.export`, or as a model directory; checked by running it."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dino_lightning.cli.checkpoints import HELP, model_file
from dino_lightning.cli.command import PROGRAM, CommandParser, run_command, writing
from dino_lightning.errors import UsageError
from dino_lightning.export import OPSETS
from dino_lightning.files import atomic_write

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

--format torch: a .pt2 file for torch.export.load, its preprocessing outside.
--format directory: a model directory as a SageMaker job leaves it: model.ckpt, model.json, and the code to serve it.
"""


def run(args: Sequence[str]) -> int:
    """Export; returns the exit code."""

    def action() -> int:
        parser = _parser()
        options = parser.parse_args(args)
        preprocessing = _preprocessing(parser, options)
        checkpoint = model_file(options.ckpt_path)
        if checkpoint.suffix.lower() == ".onnx":
            raise UsageError(f"{checkpoint} is an ONNX file already; give the checkpoint that it came from.")
        if options.format == "directory":
            output = options.output or Path("model")
            with writing(output, "--output"):
                _export_directory(checkpoint, output)
        else:
            output = _file(options.output, checkpoint, ".onnx" if options.format == "onnx" else ".pt2")
            with writing(output, "--output"):
                export_file(checkpoint, output, options.format, preprocessing, options.opset)
        print(output)
        return 0

    return run_command(action)


def _parser() -> CommandParser:
    parser = CommandParser(
        f"{PROGRAM} export",
        DESCRIPTION,
        epilog="Example: python -m dino_lightning export --ckpt_path runs/.../best.ckpt --output rooms.onnx",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, help=HELP)
    add("--output", type=Path, help="the file to write, or the folder for it (next to the checkpoint's name, here)")
    add("--format", choices=("onnx", "torch", "directory"), default="onnx", help="what to write (onnx)")
    add("--preprocessing", choices=("inside", "outside"), help="see above (inside for onnx)")
    add("--opset", type=int, default=OPSETS[0], help=f"ONNX operator set, {OPSETS[0]} to {OPSETS[-1]} ({OPSETS[0]})")
    return parser


def _preprocessing(parser: CommandParser, options: argparse.Namespace) -> str:
    """Where images are prepared.

    Raises:
        argparse.ArgumentError: options that do not go together.
    """
    if options.format != "onnx" and options.preprocessing == "inside":
        parser.error("--preprocessing inside is for --format onnx; a .pt2 file takes normalised images.")
    if options.opset not in OPSETS:
        parser.error(f"--opset is {options.opset}; choose one from {OPSETS[0]} to {OPSETS[-1]}.")
    return options.preprocessing or ("inside" if options.format == "onnx" else "outside")


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
    checkpoint: Path, output: Path, kind: str = "onnx", preprocessing: str = "inside", opset: int = OPSETS[0]
) -> None:
    """Write a checkpoint as a file that others can run, compare the two, and print how far they agree.

    Args:
        checkpoint: one of ours.
        output: the file; written only if it agrees with the checkpoint.
        kind: "onnx" or "torch".
        preprocessing: "inside" or "outside", see `export`.
        opset: the ONNX operator set, of `OPSETS`.

    Raises:
        UsageError: they do not agree.
        CheckpointError: not a checkpoint of ours.
    """
    from dino_lightning.export.check import compare_with_module, table  # imports PyTorch
    from dino_lightning.export.formats import describe_module, run_onnx, run_torch, write_onnx, write_torch
    from dino_lightning.inference.detector import load_module

    module = load_module(checkpoint)
    description = describe_module(module, preprocessing)
    with atomic_write(output) as temporary:
        prepare = None
        if kind == "onnx":
            prepare = write_onnx(module, temporary, description, opset=opset)
            detect = run_onnx(temporary)
        else:
            write_torch(module, temporary, description)
            detect = run_torch(temporary)
        rows = compare_with_module(module, detect, prepare)
        print(table(rows), flush=True)
        if not all(row.same for row in rows):
            raise UsageError(
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
