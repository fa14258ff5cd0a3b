"""Files that are whole or absent, whatever interrupts the writing."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # bytes read at a time
FORMULA_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # the last four are the full-width forms of the first four
# the disk, the quota or the size of a file is at its limit
FULL = {errno.ENOSPC, errno.EFBIG, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved there when the block ends without an error.

    Args:
        path: where the file is to be; missing folders are made. Who may read it follows from the process's umask.

    Raises:
        OSError: it cannot be written; `filename` is `path`, also where a library hides the system's error in its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{path.name[:40]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _system_error(error)
        if cause is None or cause.filename not in (None, str(temporary)):
            raise
        raise OSError(cause.errno, reason_of(cause), str(path)) from error


def _system_error(error: BaseException) -> OSError | None:
    """The system's error: itself, or of a full disk what a library raised its own because of; None if there is none."""
    if isinstance(error, OSError):
        return error
    inner = error.__context__
    while isinstance(error, RuntimeError) and inner is not None:  # as PyTorch's writer raises
        if isinstance(inner, OSError) and inner.errno in FULL:
            return inner
        inner = inner.__context__
    return None


def reason_of(error: OSError) -> str:
    """What the system says about a file, such as "No space left on device"."""
    return error.strerror or str(error)


def advice_on(error: OSError) -> str:
    """What to do about a file or folder that cannot be written, as the beginning of a sentence."""
    return "Free some space" if error.errno in FULL else "Make the folder writable"


def unwritable(path: str | Path, error: OSError, option: str) -> str:
    """The sentences about an output that cannot be written, whatever temporary file the system's error names.

    Args:
        path: what the user named.
        error: the system's.
        option: by which the user named it.
    """
    return f"{path} cannot be written ({reason_of(error)}). {advice_on(error)}, or give another {option}."


def unreadable(error: OSError) -> str:
    """What is wrong with a file or folder that cannot be read, and what to do: to follow its name, without a stop."""
    reason = f"cannot be read ({reason_of(error)})"
    return f"{reason}: change its permissions" if isinstance(error, PermissionError) else reason


def why_unreadable(path: str | Path) -> OSError | None:
    """The system's error where a file or folder is there and cannot be read; None where it can, or is not there."""
    place = Path(path)
    try:
        place.lstat()
    except OSError:  # not there, or in a folder that cannot be entered: nothing is known of it
        return None
    try:
        if place.is_dir():
            next(place.iterdir(), None)
        else:
            place.open("rb").close()
    except OSError as error:
        return error
    return None


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


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file that no spreadsheet takes for a formula; only text is changed, never a number.

    Text that begins with = + - @, a tab or a line end gets an apostrophe before it, as OWASP advises ("CSV Injection").
    Text of that kind that has apostrophes already gets one more, so that taking the first away always gives the text
    back.
    """
    return f"'{value}" if isinstance(value, str) and value.lstrip("'")[:1] in FORMULA_STARTS else value


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as a PNG; a half-written picture is never seen."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


@contextmanager
def locked(path: Path, *, remove: bool = False) -> Iterator[bool]:
    """Hold a lock file, whose folder is made if need be; gives False if another process holds it.

    The system gives the lock back when the process ends, however it does. `lockf`, as loader processes would inherit a
    lock of `flock`, and keep it for seconds after this process was killed. Nothing is locked between two parts of one
    process.

    Args:
        path: the file.
        remove: remove the file in the end.

    Raises:
        OSError: the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a") as file:
            held = _lock(file.fileno())
            if held and not _is_at(path, file.fileno()):
                continue  # its last holder removed the file just after it was opened here
            try:
                yield held
            finally:
                if held and remove:
                    path.unlink(missing_ok=True)
            return


def _is_at(path: Path, file: int) -> bool:
    """Whether an open file is still the one at this path."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


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
