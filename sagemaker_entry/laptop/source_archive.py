"""The code that a job runs: the installed packages `dino_lightning` and `sagemaker_entry`, with their requirements."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from dino_lightning.export.package_code import package_files, requirements, sources
from sagemaker_entry.protocol.job import REQUIREMENTS


def build_archive(backbone: str = "", extras: Sequence[str] = ()) -> bytes:
    """The code of a job as a tar.gz archive; the same files give the same bytes. Arguments as of `requirements`."""
    entry = Path(__file__).parent.parent
    files = package_files() | {f"sagemaker_entry/{path.relative_to(entry).as_posix()}": path for path in sources(entry)}
    contents = {name: path.read_bytes() for name, path in files.items()}
    contents[REQUIREMENTS] = ("\n".join(requirements(backbone, extras)) + "\n").encode()
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name in sorted(contents):
            entry_info = tarfile.TarInfo(name)
            entry_info.size = len(contents[name])
            tar.addfile(entry_info, io.BytesIO(contents[name]))
    return buffer.getvalue()
