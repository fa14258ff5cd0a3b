"""The code that a job runs: the installed project itself, packed, with the list of what it needs."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
from importlib import metadata
from pathlib import Path

import dino_lightning
from sagemaker_entry.install import KEPT, REQUIREMENTS

PROJECT = Path(__file__).parent.parent  # the packages' parent: a checkout, site-packages, or a job's code folder
DISTRIBUTION = "dino-lightning"


def requirements() -> list[str]:
    """What the package needs beside torch and torchvision, which come with the image."""
    shipped = PROJECT / REQUIREMENTS
    if shipped.is_file():  # in a job the package is not installed, but its list lies beside it
        return shipped.read_text().split("\n")[:-1]
    needed = metadata.requires(DISTRIBUTION) or []
    return [line for line in needed if "extra ==" not in line and re.split(r"[^\w.-]", line)[0] not in KEPT]


def package_files() -> dict[str, Path]:
    """The files of `dino_lightning`, name in an archive to place on disk."""
    package = Path(dino_lightning.__file__).parent
    files = {f"dino_lightning/{path.relative_to(package).as_posix()}": path for path in _sources(package)}
    checkout = package.parent / "configs"
    if not (package / "configs").is_dir() and checkout.is_dir():  # a wheel has them inside
        files |= {f"dino_lightning/configs/{path.name}": path for path in checkout.glob("*.yaml")}
    return files


def build_archive() -> bytes:
    """The code of a job as tar.gz: the same bytes for the same files."""
    entry = Path(__file__).parent
    files = package_files() | {
        f"sagemaker_entry/{path.relative_to(entry).as_posix()}": path for path in _sources(entry)
    }
    contents = {name: path.read_bytes() for name, path in files.items()}
    contents[REQUIREMENTS] = ("\n".join(requirements()) + "\n").encode()
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name in sorted(contents):
            entry_info = tarfile.TarInfo(name)
            entry_info.size = len(contents[name])
            tar.addfile(entry_info, io.BytesIO(contents[name]))
    return buffer.getvalue()


def _sources(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".yaml", ".typed")]
