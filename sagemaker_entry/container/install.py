"""Install the packages that the image lacks, without replacing the image's torch."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from sagemaker_entry.protocol.job import REQUIREMENTS
from sagemaker_entry.protocol.problem import Problem

KEPT = ("torch", "torchvision")  # built for the image's CUDA version; another build may not see the GPUs
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


def constraints() -> list[str]:
    """A line of pip's constraints file for each package whose version must not change."""
    return [f"{name}=={version}" for name in KEPT if (version := _version(name)) is not None]


def require_torch() -> None:
    """Check that the image has torch and torchvision.

    Raises:
        Problem: one of them is missing.
    """
    missing = [name for name in KEPT if _version(name) is None]
    if missing:
        raise Problem(f"The image has no {' and no '.join(missing)}; choose a PyTorch training image with --image.")


def install(folder: Path, run: Run) -> None:
    """Install the requirements file beside the code; takes a second where all are installed already.

    Args:
        folder: the folder of the code.
        run: runs a command and returns its exit code and output.

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
            f"pip could not install the requirements ({reasons[0]}); the container needs access to a package index: "
            "no network isolation, and a NAT gateway in a VPC."
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
