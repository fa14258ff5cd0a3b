"""The packages of a job without a network: wheels for the image's Python, downloaded here and sent along."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from email.parser import HeaderParser
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dino_lightning.export.package_code import FROM_THE_IMAGE
from dino_lightning.weights.download import cache_folder
from sagemaker_entry.protocol.problem import Problem

TESTED = Path(__file__).parent.parent / "container" / "constraints.txt"
OLDEST_GLIBC, NEWEST_GLIBC = 5, 34  # of manylinux_2_N; Amazon Linux 2023 has 2.34, Ubuntu 22.04 has 2.35
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in range(NEWEST_GLIBC, OLDEST_GLIBC - 1, -1)),
    *("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"),
)


def wheelhouse(requirements: Sequence[str], python: str) -> Path:
    """A folder with the wheels of some requirements and of all that they need, but for torch and torchvision.

    It is made once for each list of requirements and kept in the user's cache, so that the next launch sends nothing.

    Args:
        requirements: lines of a requirements file.
        python: the Python of the image, such as "3.12"; the wheels are for Linux on x86_64.

    Raises:
        Problem: this Python has no pip, or a wheel cannot be had.
    """
    pins = pins_for(python)
    key = hashlib.sha256("\n".join([python, *requirements, *pins]).encode()).hexdigest()[:20]
    folder = cache_folder().parent / "wheels" / key
    if folder.is_dir():
        return folder
    if find_spec("pip") is None:
        raise Problem("--network-isolation downloads packages with pip, which this Python lacks: python -m ensurepip.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as made:
        wheels = Path(made) / "wheels"
        wheels.mkdir()
        _fill(wheels, requirements, pins, python)
        if not folder.is_dir():  # another launch may have made it meanwhile
            shutil.move(wheels, folder)
    return folder


def pins_for(python: str) -> list[str]:
    """The versions of constraints.txt for a Python, as lines without conditions, which pip would apply to its own."""
    lines = [line for line in TESTED.read_text().splitlines() if line.strip() and not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    return [f"{pin.name}{pin.specifier}" for pin in pins if _applies(pin, python, ("",))]


def _fill(wheels: Path, requirements: Sequence[str], pins: Sequence[str], python: str) -> None:
    """Download the wheels, round by round: what the wheels of a round need is downloaded in the next.

    pip itself would follow the requirements of this machine's Python and system, and bring torch.
    """
    constraints = wheels.parent / "constraints.txt"
    constraints.write_text("\n".join(pins) + "\n")
    wanted: dict[str, list[Requirement]] = {}
    asked = {line: Requirement(line) for line in requirements}
    known: set[str] = set()
    while asked:
        known |= asked.keys()
        for requirement in asked.values():
            wanted.setdefault(canonicalize_name(requirement.name), []).append(requirement)
        there = _versions(wheels)
        missing = sorted(name for name, each in wanted.items() if not _meets(there.get(name), each))
        _download(wheels, [_joined(name, wanted[name]) for name in missing], constraints, python)
        needs = [each for wheel in sorted(wheels.glob("*.whl")) for each in _needs(wheel, wanted, python)]
        asked = {
            str(each): each
            for each in needs
            if str(each) not in known and canonicalize_name(each.name) not in FROM_THE_IMAGE
        }


def _versions(wheels: Path) -> dict[str, Version]:
    """The version of each package in the folder."""
    names = [path.name.split("-")[:2] for path in wheels.glob("*.whl")]
    return {canonicalize_name(name): Version(version) for name, version in names}


def _meets(version: Version | None, requirements: Sequence[Requirement]) -> bool:
    return version is not None and all(each.specifier.contains(version, prereleases=True) for each in requirements)


def _joined(name: str, requirements: Sequence[Requirement]) -> str:
    """One requirement that asks for what all of them ask for."""
    return name + ",".join(sorted({str(part) for each in requirements for part in each.specifier}))


def _needs(wheel: Path, wanted: dict[str, list[Requirement]], python: str) -> Iterator[Requirement]:
    """What a wheel needs in the image, with the extras that are asked of it."""
    name = canonicalize_name(wheel.name.split("-")[0])
    extras = {"", *(extra for requirement in wanted.get(name, []) for extra in requirement.extras)}
    with zipfile.ZipFile(wheel) as archive:
        (place,) = [entry for entry in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry)]
        headers = HeaderParser().parsestr(archive.read(place).decode())
    for line in headers.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        if _applies(requirement, python, sorted(extras)):
            yield requirement


def _applies(requirement: Requirement, python: str, extras: Sequence[str]) -> bool:
    """Whether a requirement's condition is met in the image with one of these extras."""
    image = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    return requirement.marker is None or any(requirement.marker.evaluate({**image, "extra": e}) for e in extras)


def _download(folder: Path, requirements: Sequence[str], constraints: Path, python: str) -> None:
    if not requirements:
        return
    for requirement in requirements:  # an earlier round may have brought a version that a later one does not allow
        name = Requirement(requirement).name
        for old in folder.glob("*.whl"):
            if canonicalize_name(old.name.split("-")[0]) == name:
                old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    command += ["--dest", str(folder), "-c", str(constraints), *requirements]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise Problem(
            f"--network-isolation: the packages cannot be downloaded ({reason.removeprefix('ERROR: ')[:300]}); either "
            f"this machine does not reach the package index, or there is no wheel for Python {python} on Linux x86_64: "
            "then choose an image with another Python by --torch, or one of your own with all packages in it."
        )
