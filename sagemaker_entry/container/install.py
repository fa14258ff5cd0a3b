"""Installing in the container what the package needs and the image lacks, without touching the image's torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from sagemaker_entry.protocol.job import REQUIREMENTS
from sagemaker_entry.protocol.problem import Problem

KEPT = ("torch", "torchvision")  # built for the image's CUDA; another build would not see the GPUs
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def constraints() -> list[str]:
    """A constraint for each package that pip must leave as it is."""
    return [f"{name}=={version}" for name in KEPT if (version := _version(name)) is not None]


def require_torch() -> None:
    """Make sure that the image brings torch and torchvision.

    Raises:
        Problem: it does not.
    """
    missing = [name for name in KEPT if _version(name) is None]
    if missing:
        raise Problem(f"The image has no {' and no '.join(missing)}; choose a PyTorch training image with --image.")


def install(folder: Path, run: Run) -> None:
    """Install the requirements that lie beside the code; quick where all are there already.

    Args:
        folder: where the code is.
        run: runs a command and gives its exit code and output.

    Raises:
        Problem: pip failed.
    """
    requirements = folder / REQUIREMENTS
    if not requirements.is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "constraints.txt"
        pinned.write_text("\n".join(constraints()) + "\n")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        command += ["--root-user-action=ignore", "-r", str(requirements), "-c", str(pinned)]
        done = run(command)
    if done.returncode != 0:
        reasons = [line for line in done.stdout.splitlines() if line.startswith("ERROR")] or [
            done.stdout.strip()[-300:]
        ]
        raise Problem(
            f"pip could not install the requirements ({reasons[0]}); the container needs a way to a package index, so "
            "no network isolation, and a NAT gateway in a VPC."
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
