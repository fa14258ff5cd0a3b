"""Install the packages that the image lacks, with what the image has, and without replacing the image's torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from sagemaker_entry.protocol.job import REQUIREMENTS
from sagemaker_entry.protocol.problem import Problem

KEPT = ("torch", "torchvision")  # built for the image's CUDA version; another build may not see the GPUs
TESTED = Path(__file__).with_name("constraints.txt")  # versions that the tests have passed with
Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]

# What uv and pip print where the index cannot be reached, or where something on the way refuses it.
_NO_NETWORK = re.compile(
    r"(failed to establish a new connection|connection (?:was )?(?:refused|reset|aborted)|connection broken|"
    r"(?:connect|read|operation)[\w ]* timed out|network is unreachable|no route to host|name or service not known|"
    r"temporary failure in name resolution|dns error|proxyerror|cannot connect to proxy|tunnel (?:error|connection)|"
    r"40[37] (?:client error|forbidden|proxy)|certificate.verify.failed|error sending request)[^'\")\n]*",
    re.IGNORECASE,
)
_NOT_MET = re.compile(
    r"no matching distribution|no solution found|resolutionimpossible|invalid requirement|failed to parse|"
    r"conflicting dependencies",
    re.IGNORECASE,
)
_NOTHING_FOUND = "(from versions: none)"  # pip hides why: there is no such package, or the index refuses


def constraints() -> list[str]:
    """The lines of the constraints file: the image's torch and torchvision, and the tested versions of the others."""
    kept = [f"{name}=={version}" for name in KEPT if (version := _version(name)) is not None]
    tested = TESTED.read_text().splitlines()
    return [*kept, *(line for line in tested if line.strip() and not line.startswith("#"))]


def require_torch() -> None:
    """Check that the image has torch and torchvision.

    Raises:
        Problem: one of them is missing.
    """
    missing = [name for name in KEPT if _version(name) is None]
    if missing:
        raise Problem(f"The image has no {' and no '.join(missing)}; choose a PyTorch training image with --image.")


def install(folder: Path, run: Run, *, wheels: Path | None = None, environ: Mapping[str, str] = os.environ) -> None:
    """Install the requirements file beside the code; takes a second where all are installed already.

    Args:
        folder: the folder of the code.
        run: runs a command and returns its exit code and output.
        wheels: a folder of packages that came with the job, to install from without a network.
        environ: the environment variables of the process.

    Raises:
        Problem: the image has no installer, the network is missing, or a requirement cannot be met.
    """
    requirements = folder / REQUIREMENTS
    if not requirements.is_file():
        return
    tool, command = _installer(run, environ)
    if wheels is not None:
        command += ["--no-index", "--find-links", str(wheels)]
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch) / "constraints.txt"
        pinned.write_text("\n".join(constraints()) + "\n")
        command += ["-r", str(requirements), "-c", str(pinned)]
        done = run(command)
        output = done.stdout
        if done.returncode != 0 and wheels is None and _NOTHING_FOUND in output:
            output += run([*command, "-vv"]).stdout  # with the answers of the index
    if done.returncode != 0:
        print(output, flush=True)
        raise Problem(_why(tool, output, wheels))


def _installer(run: Run, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """The name of the installer that the image has, and its command up to the requirements.

    Raises:
        Problem: there is none.
    """
    uv = shutil.which("uv", path=environ.get("PATH"))
    if uv is not None:
        command = [uv, "pip", "install", "--python", sys.executable]
        for option, variable in (("--index-url", "PIP_INDEX_URL"), ("--extra-index-url", "PIP_EXTRA_INDEX_URL")):
            command += [option, environ[variable]] if environ.get(variable) else []  # which uv does not read
        return "uv", command
    if importlib.util.find_spec("pip") is None:
        done = run([sys.executable, "-m", "ensurepip"])
        if done.returncode != 0:
            raise Problem(
                f"The image has nothing to install packages with: no uv, no pip, and ensurepip failed "
                f"({_last_line(done.stdout)}); choose another image, or put uv or pip into yours."
            )
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--root-user-action=ignore"]
    return "pip", command


def _why(tool: str, output: str, wheels: Path | None) -> str:
    """One sentence about a failed installation: the network, the requirements, or the packages that came along."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    python = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    network = [" ".join(found[0].split()) for found in _NO_NETWORK.finditer(output)]
    unmet = any(_NOT_MET.search(line) for line in lines)
    if wheels is not None:
        return (
            f"{tool} could not install the packages that came with the job ({_reason(tool, lines)}): they may be for "
            f"another Python than this image's {python}; launch again, with --torch for one of AWS's images."
        )
    if network:
        cause = network[-1].removesuffix(" - skipping")[:200]  # the last one is the most exact
        return (
            f"{tool} could not reach the package index ({cause}): the container needs a network to install its "
            "packages. In a VPC that is a NAT gateway, or a proxy that allows the index; or launch with "
            "--network-isolation, which sends the packages along."
        )
    if unmet:
        return (
            f"{tool} reached the package index, but a requirement cannot be met with {python} "
            f"({_reason(tool, lines)}); correct {REQUIREMENTS}, or choose an image with another Python by --torch or "
            "--image."
        )
    return f"{tool} could not install the requirements ({_reason(tool, lines)}); the job's log has all of its output."


def _reason(tool: str, lines: Sequence[str]) -> str:
    """The line of the output that says most."""
    marks = ("cause: ", "error: ") if tool == "uv" else ("ERROR: ",)
    found = [line for mark in marks for line in lines if line.startswith(mark)]
    reason = found[0] if found else _last_line("\n".join(lines))
    for mark in marks:
        reason = reason.removeprefix(mark)
    return reason[:300].rstrip(".")


def _last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1][-300:]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
