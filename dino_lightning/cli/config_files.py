"""Configuration files that come with the package, found from any folder."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path


def config_path(name: str) -> Path:
    """A configuration file that comes with the package, in a checkout as in an installed wheel.

    Args:
        name: of the file, with or without `.yaml`.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    file = _packaged().get(name.removesuffix(".yaml"))
    if file is None:
        raise FileNotFoundError(name)
    return file


def absent_config(path: str) -> str:
    """One sentence about a configuration that is not there, with those of the package that its name comes close to."""
    names = sorted(_packaged())
    near = difflib.get_close_matches(Path(path).name.removesuffix(".yaml"), names, n=1)
    if near:
        return f"--config: {path} does not exist. Did you mean configs/{near[0]}.yaml, which comes with this package?"
    return f"--config: {path} does not exist. With this package come {', '.join(names)}."


def _packaged() -> dict[str, Path]:
    """The files by their names without `.yaml`; none where the package was copied without them."""
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return {file.stem: file for file in folder.glob("*.yaml")}
    return {}


def with_packaged_configs(args: Sequence[str]) -> list[str]:
    """Let `--config configs/NAME.yaml`, or `--config NAME`, work from any directory for those of the package."""
    return [_packaged_config(previous, arg) for previous, arg in zip(["", *args], args, strict=False)]


def _packaged_config(previous: str, arg: str) -> str:
    option, _, value = arg.partition("=") if arg.startswith("--config=") else (previous, "", arg)
    if option not in ("--config", "-c") or "\n" in value or Path(value).is_file():  # a text is a configuration itself
        return arg
    try:
        found = str(config_path(Path(value).name))
    except FileNotFoundError:
        return arg
    return f"--config={found}" if arg.startswith("--config=") else found
