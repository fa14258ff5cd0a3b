"""`deploy --onnx` and `transform --onnx`: a model with `model.onnx`, which its server runs where there is no GPU."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dino_lightning.export.model_directory import CODE_FOLDER, MODEL_FILE
from dino_lightning.export.package_code import ONNX_RUNTIME, REQUIREMENTS
from sagemaker_entry.protocol.manifest import extract_safely
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:
    from sagemaker_entry.laptop.account import Account
    from sagemaker_entry.laptop.serving_requests import TrainedModel

ONNX_FILE = "model.onnx"  # as `sagemaker_entry.inference` looks for it
PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # of the extra `export`
Say = Callable[[str], None]


def need_packages() -> None:
    """Check that this machine can export.

    Raises:
        Problem: it lacks a package.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise Problem(f"--onnx needs {' and '.join(missing)}: python -m pip install 'dino-lightning[export]'.")


def export_here(folder: Path, say: Say) -> None:
    """Export the model of a folder beside it, for a server on this machine.

    Args:
        folder: with `model.ckpt`, as a job leaves it.
        say: prints a line.

    Raises:
        Problem: this machine has a GPU, with which the server would compute instead, or lacks a package.
        UsageError: what was exported does not agree with the checkpoint.
    """
    import torch  # takes seconds

    if torch.cuda.is_available():
        raise Problem("--onnx is for CPUs, and this machine has a GPU, where the checkpoint runs; leave out --onnx.")
    need_packages()
    if add_onnx(folder, say):
        say(f"It stays in {folder}, and servers of this folder run it from now on.\n")


def add_onnx(folder: Path, say: Say) -> bool:
    """Export the model of a folder to `model.onnx` beside it, unless it has that file.

    Args:
        folder: with `model.ckpt`, as a job leaves it.
        say: prints a line.

    Returns:
        Whether the file was made.

    Raises:
        UsageError: what was exported does not agree with the checkpoint.
        Problem: there is no model in the folder.
    """
    target = folder / ONNX_FILE
    if target.is_file():
        say(f"{ONNX_FILE} is in the model already, and is what runs.")
        return False
    if not (folder / MODEL_FILE).is_file():
        raise Problem(f"The model holds no {MODEL_FILE}, so there is nothing to export.")
    from dino_lightning.cli.export import export_file  # imports PyTorch

    say(f"{ONNX_FILE} is exported from {MODEL_FILE} on this machine, and compared with it:")
    export_file(folder / MODEL_FILE, target)
    return True


def with_onnx(archive: Path, scratch: Path, say: Say) -> Path | None:
    """A model's archive with `model.onnx` and onnxruntime among its requirements; None where it has both.

    The same archive and the same file give the same bytes.

    Args:
        archive: `model.tar.gz` of a job.
        scratch: an empty folder for what is unpacked and for the new archive.
        say: prints a line.

    Raises:
        Problem: the archive was not written by a job.
    """
    folder = scratch / "model"
    folder.mkdir()
    extract_safely(archive, folder)
    changed = add_onnx(folder, say)
    requirements = folder / CODE_FOLDER / REQUIREMENTS
    if not requirements.is_file():
        raise Problem(f"The model has no {CODE_FOLDER}/{REQUIREMENTS}: it was not written by a job of this program.")
    lines = requirements.read_text().splitlines()
    if not any(line.startswith("onnxruntime") for line in lines):
        requirements.write_text("\n".join([*lines, ONNX_RUNTIME]) + "\n")
        changed = True
    if not changed:
        return None
    packed = scratch / archive.name
    with (
        packed.open("wb") as file,
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="", compresslevel=1) as stream,
        tarfile.open(fileobj=stream, mode="w") as tar,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
                entry.size, entry.mode = path.stat().st_size, 0o644
                with path.open("rb") as content:
                    tar.addfile(entry, content)
    shutil.rmtree(folder)
    return packed


def place_of(model: TrainedModel) -> str:
    """The S3 folder for the archives with `model.onnx` of a model, without a last slash."""
    return f"{model.output}/{model.job}/onnx"


def planned_with_onnx(model: TrainedModel, say: Say, *, own_image: bool) -> TrainedModel:
    """Say what will run; returns the model with the address of the copy that is uploaded if it has no ONNX file.

    Raises:
        Problem: this machine lacks a package to export with.
    """
    need_packages()
    packages = "Your image must have onnxruntime in it." if own_image else "onnxruntime is added to what it installs."
    say(
        f"ONNX Runtime computes on the CPU, with {ONNX_FILE} of the model. If it has none, it is exported on this "
        f"machine, compared with the checkpoint, and uploaded in a copy of the model. {packages}"
    )
    return replace(model, artifact=f"{place_of(model)}/<content>/model.tar.gz")


def upload_with_onnx(account: Account, model: TrainedModel, say: Say) -> TrainedModel:
    """The model with an archive that has `model.onnx`, made and uploaded if its own has none.

    Raises:
        Problem: AWS refused, or the archive was not written by a job.
        UsageError: what was exported does not agree with the checkpoint.
    """
    from sagemaker_entry.laptop.dataset_upload import upload_file
    from sagemaker_entry.laptop.job_commands import download

    bucket, _, prefix = place_of(model).removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory(prefix="dino-onnx-") as place:
        archive = Path(place) / "given" / "model.tar.gz"
        archive.parent.mkdir()
        download(account, model.job, model.artifact, archive)
        made = with_onnx(archive, Path(place), say)
        if made is None:
            return model
        folder = upload_file(account.client("s3"), made, bucket, prefix, account.id, model.kms_key)
    say(f"Uploaded {folder}{made.name}")
    return replace(model, artifact=f"{folder}{made.name}")
