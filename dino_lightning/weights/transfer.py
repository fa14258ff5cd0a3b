"""Transfers by HTTP and from S3: into a file, with a progress bar, from where the last one broke off."""

from __future__ import annotations

import base64
import ipaddress
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from tqdm import tqdm

from dino_lightning.console import REDACTED, bar_seconds, without_secrets
from dino_lightning.errors import CheckpointError

_CHUNK = 1 << 20
_TRIES = 5
_PAUSE = 1.0  # seconds before the second try, doubled for each further one
_SECONDS_WITHOUT_DATA = 60.0


class _Interrupted(Exception):
    """A transfer that broke off and can be resumed."""


class _Part(NamedTuple):
    """A stream from byte `start` on, of a file of `size` bytes (None if unknown); `version` identifies its content."""

    stream: BinaryIO
    start: int
    size: int | None
    version: str


def download(address: str, part: Path, token: str | None = None) -> None:
    """Download an address to `part` with a progress bar, resuming from the bytes in `part`.

    Args:
        address: beginning with https://, http:// or s3://.
        part: of the bytes so far; a file beside it says of which version they are.
        token: that opens the address; not sent to where the server redirects.

    Raises:
        CheckpointError: the address cannot be read, or breaks off again and again.
        OSError: the file cannot be written.
    """
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            _transfer(address, part, token)
        except _Interrupted as error:
            reason = _scrubbed(error, address)
        else:
            return
    have = part.stat().st_size if part.exists() else 0
    kept = f"{have:,} bytes are kept, and the next run resumes from there" if have else "nothing was received"
    raise CheckpointError(f"Downloading {without_secrets(address)} failed {_TRIES} times (last: {reason}); {kept}.")


def without_user(address: str) -> tuple[str, str | None]:
    """The address without user and password, and these as a header's value for HTTP's basic authentication."""
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return address, None
    encoded = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), f"Basic {encoded}"


def is_unencrypted(address: str) -> bool:
    """Whether an address is http:// and the server another machine."""
    parts = urllib.parse.urlsplit(address)
    host = parts.hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    return parts.scheme == "http" and not here


def _scrubbed(reason: object, address: str) -> str:
    """A reason given by another package, which may quote parts of the address, on one line and without its secrets."""
    parts = urllib.parse.urlsplit(address)
    user = parts.netloc.rpartition("@")[0]
    text = " ".join(str(without_secrets(str(reason))).split())
    for secret in (parts.query, user, user.partition(":")[2]):
        for form in (secret, urllib.parse.unquote(secret)):
            text = text.replace(form, REDACTED) if form else text
    return text


class _KeepsEncryption(urllib.request.HTTPRedirectHandler):
    """Refuses to be sent from https:// to http://."""

    def redirect_request(self, req: urllib.request.Request, *args: Any) -> urllib.request.Request | None:
        """As in the base class."""
        if req.type == "https" and is_unencrypted(args[-1]):
            raise CheckpointError(
                f"{without_secrets(req.full_url)} cannot be downloaded: the server redirects to an address that is not "
                f"encrypted, {without_secrets(args[-1])}."
            )
        return super().redirect_request(req, *args)


def _transfer(address: str, part: Path, token: str | None) -> None:
    """Append the missing bytes to `part`; a file beside it holds the version that its bytes are of."""
    version = part.with_name(f"{part.name}.version")
    known = version.read_text() if version.is_file() else ""
    have = part.stat().st_size if part.is_file() and known else 0
    opened = _open_s3(address, have, known) if address.startswith("s3://") else _open_http(address, have, known, token)
    name = Path(urllib.parse.urlsplit(address).path).name
    with (
        opened.stream as stream,
        part.open("ab") as file,
        tqdm(
            desc=name,
            total=opened.size,
            initial=opened.start,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            mininterval=bar_seconds(),
        ) as bar,
    ):
        file.truncate(opened.start)
        version.write_text(opened.version)
        while chunk := _read(stream):
            file.write(chunk)
            bar.update(len(chunk))
        have = file.tell()
    if opened.size is not None and have != opened.size:
        raise _Interrupted(f"{have:,} of {opened.size:,} bytes received")
    version.unlink()


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(_CHUNK)
    except Exception as error:  # of any package that reads the stream
        raise _Interrupted(str(error) or type(error).__name__) from error


def _open_http(address: str, have: int, known: str, token: str | None) -> _Part:
    """The bytes after the first `have`, or all if the server cannot skip or has another version than `known`."""
    # If-Range: the server sends everything if its version is another one.
    headers = {"Range": f"bytes={have}-", "If-Range": known} if have else {}
    bare, user = without_user(address)
    request = urllib.request.Request(bare, headers=headers)
    if user is not None:
        request.add_unredirected_header("Authorization", user)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # not to where the file itself lies
    try:
        answer = urllib.request.build_opener(_KeepsEncryption).open(request, timeout=_SECONDS_WITHOUT_DATA)
    except CheckpointError:  # a redirection that was refused; a ValueError as well
        raise
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # there are no bytes after ours; rare, so start again
            return _open_http(address, 0, "", token)
        if error.code >= 500 or error.code == 429:
            raise _Interrupted(f"the server says {error.code} {error.reason}") from error
        raise CheckpointError(
            f"{without_secrets(address)} cannot be downloaded: the server says {error.code} {error.reason}."
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise _Interrupted(str(getattr(error, "reason", None) or error)) from error
    length = answer.headers.get("Content-Length")
    start = have if answer.status == 206 else 0
    tag = answer.headers.get("ETag") or ""
    version = answer.headers.get("Last-Modified") or "" if tag.startswith("W/") or not tag else tag
    return _Part(answer, start, start + int(length) if length is not None else None, version)


def _open_s3(address: str, have: int, known: str) -> _Part:
    """As `_open_http`, from S3 with the credentials of the environment."""
    shown = without_secrets(address)
    try:
        stream = fsspec.open(address, "rb").open()
        version = str(stream.details.get("ETag", ""))
        size = int(stream.size)
        start = have if version == known and have <= size else 0
        stream.seek(start)
    except ImportError as error:
        raise CheckpointError(f"Reading {shown} needs the package s3fs: pip install s3fs.") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{shown} does not exist.") from error
    except Exception as error:  # credentials, permissions, network: of packages not imported here
        raise CheckpointError(f"{shown} cannot be read ({_scrubbed(error, address)}).") from error
    return _Part(stream, start, size, version)
