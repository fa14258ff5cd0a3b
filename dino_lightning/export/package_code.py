"""The code of this package as files: for a job, and for a model directory that is served."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
PROJECT = PACKAGE.parent  # a checkout, site-packages, or a job's code folder
DISTRIBUTION = "dino-lightning"
REQUIREMENTS = "requirements.txt"
FROM_THE_IMAGE = ("torch", "torchvision")  # built for the image's CUDA; another build would not see the GPUs
HANDLER = "inference.py"
SOURCES = (".py", ".yaml", ".typed", ".jinja", ".css", ".js", ".txt")
WEIGHTS = ".pt"  # that come with the package: a job may start from them, a served model has its own


def requirements(backbone: str = "", extras: Sequence[str] = ()) -> list[str]:
    """What the package needs beside torch and torchvision, which come with the image.

    Args:
        backbone: its name; timm is added for one of timm.
        extras: of this package, whose requirements are added.
    """
    shipped = PROJECT / REQUIREMENTS
    if shipped.is_file():  # in a job the package is not installed, but its list lies beside it
        return shipped.read_text().split("\n")[:-1]
    needed = metadata.requires(DISTRIBUTION) or []
    own = [line for line in needed if "extra ==" not in line and re.split(r"[^\w.-]", line)[0] not in FROM_THE_IMAGE]
    for extra in (backbone.partition("/")[0], *extras):  # the first is a library of networks, which an extra has
        own += [line.partition(";")[0].strip() for line in needed if re.search(f"extra == .{extra}\\W", line + " ")]
    return own


def package_files() -> dict[str, Path]:
    """The files of the package with its weights, name in an archive to place on disk."""
    files = {f"{PACKAGE.name}/{path.relative_to(PACKAGE).as_posix()}": path for path in sources(PACKAGE)}
    checkout = PROJECT / "configs"
    if not (PACKAGE / "configs").is_dir() and checkout.is_dir():  # a wheel has them inside
        files |= {f"{PACKAGE.name}/configs/{path.name}": path for path in checkout.glob("*.yaml")}
    return files


def serving_code(backbone: str = "") -> dict[str, bytes]:
    """What a model server needs: the package, its requirements with those of the backbone, and the handler.

    The handler is a file of `sagemaker_entry`, which lies beside this package wherever that is installed.
    """
    files = package_files() | {HANDLER: PROJECT / "sagemaker_entry" / HANDLER}
    code = {name: path.read_bytes() for name, path in files.items() if path.suffix != WEIGHTS}
    return code | {REQUIREMENTS: ("\n".join(requirements(backbone)) + "\n").encode()}


def sources(folder: Path) -> list[Path]:
    """The files of a package that a program, its types and its pages are made of."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix in (*SOURCES, WEIGHTS)]
