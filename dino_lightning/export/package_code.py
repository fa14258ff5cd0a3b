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
# Of training, evaluation and pages alone.
NOT_SERVED = (
    "lightning", "torchmetrics", "faster-coco-eval", "jsonargparse", "scipy", "matplotlib", "jinja2", "tensorboard",
)  # fmt: skip
SERVER = ("starlette>=0.41", "uvicorn>=0.30")  # the extra `serve`; a job, where nothing is installed, reads it here
ONNX_RUNTIME = "onnxruntime>=1.18"  # of the extra `export`; only a model that is served with an ONNX file needs it
HANDLER = "inference.py"
# Of `sagemaker_entry`: the server, with what installs the requirements in an image that lacks them.
ENTRY_FILES = (
    "__init__.py",
    HANDLER,
    "serve.py",
    "container/__init__.py",
    "container/constraints.txt",
    "container/install.py",
    "protocol/__init__.py",
    "protocol/job.py",
    "protocol/problem.py",
)
# The file that AWS's inference toolkit looks for.
TOOLKIT_HANDLER = """\"\"\"The functions that AWS's inference toolkit calls.\"\"\"

from sagemaker_entry.inference import input_fn, model_fn, output_fn, predict_fn

__all__ = ["input_fn", "model_fn", "output_fn", "predict_fn"]
"""
# Read by the bash of AWS's training images, through the variable BASH_ENV, before their start script runs the word that
# SageMaker gives it, `serve`: for which these images have no program.
SERVE_FUNCTION = "serve.sh"
SERVE_FUNCTION_CODE = """serve() {
  unset BASH_ENV
  export PYTHONPATH="${DINO_LIGHTNING_CODE:-/opt/ml/model/code}"
  exec python -m sagemaker_entry.serve --install
}
"""
SOURCES = (".py", ".cu", ".yaml", ".json", ".typed", ".jinja", ".css", ".js", ".txt")
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
    own = [line for line in needed if "extra ==" not in line and _package(line) not in FROM_THE_IMAGE]
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


def serving_requirements(backbone: str = "") -> list[str]:
    """What serving needs beside torch and torchvision: less than training, and a server."""
    return [line for line in requirements(backbone) if _package(line) not in NOT_SERVED] + list(SERVER)


def serving_code(backbone: str = "") -> dict[str, bytes]:
    """What a model server needs: the package, the server, and its requirements with those of the backbone.

    The server is of `sagemaker_entry`, which lies beside this package wherever that is installed.
    """
    entry = PROJECT / "sagemaker_entry"
    files = package_files() | {f"{entry.name}/{name}": entry / name for name in ENTRY_FILES}
    code = {name: path.read_bytes() for name, path in files.items() if path.suffix != WEIGHTS}
    texts = {
        HANDLER: TOOLKIT_HANDLER,
        SERVE_FUNCTION: SERVE_FUNCTION_CODE,
        REQUIREMENTS: "\n".join(serving_requirements(backbone)) + "\n",
    }
    return code | {name: text.encode() for name, text in texts.items()}


def _package(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0]


def sources(folder: Path) -> list[Path]:
    """The files of a package that a program, its types and its pages are made of."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix in (*SOURCES, WEIGHTS)]
