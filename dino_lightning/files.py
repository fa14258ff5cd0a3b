"""Files that are whole or absent, whatever interrupts the writing."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # bytes read at a time


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved there when the block ends without an error.

    Args:
        path: where the file is to be; missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"tmp-{path.name[:40]}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: Path, suffix: str) -> None:
    """Remove what a process that was killed in `atomic_write` has left in a folder of files with this suffix."""
    for left in folder.glob(f"tmp-*{suffix}-????????{suffix}"):
        left.unlink(missing_ok=True)


def previous_checkpoint(last: Path) -> Path:
    """Where the checkpoint is kept that `last.ckpt` replaced: in the same folder."""
    return last.with_name("previous.ckpt")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal; read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG; a half-written picture is never seen."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
