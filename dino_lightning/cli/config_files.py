"""Configuration files that come with the package, found from any folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def config_path(name: str) -> Path:
    """A configuration file that comes with the package, in a checkout as in an installed wheel.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(name)


def with_packaged_configs(args: Sequence[str]) -> list[str]:
    """Let `--config configs/NAME.yaml` work from any directory for the files that come with the package."""
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
