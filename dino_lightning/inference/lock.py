"""One `predict` at a time in a folder of results."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".predict.lock"


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the folder, which is made if need be; gives False if another process holds it.

    The system gives the lock back when the process ends, however it does. The file stays: to delete it would let two
    processes lock two files of the same name. `lockf`, as loader processes would inherit a lock of `flock`, and keep it
    for seconds after this process was killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        yield _lock(file.fileno())


def _lock(file: int) -> bool:
    try:
        import fcntl
    except ImportError:  # on Windows, where nothing is locked
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # of another kind: a file system that has no locks
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
