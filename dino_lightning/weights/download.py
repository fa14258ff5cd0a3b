"""Local files for weights: a path as it is, an address downloaded once into a cache."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from filelock import FileLock
from tqdm import tqdm

from dino_lightning.console import REDACTED, bar_seconds, lacks_secrets, without_secrets
from dino_lightning.errors import CheckpointError
from dino_lightning.files import advice_on, reason_of, sha256_of

HUB_SCHEME = "hf://"
_SCHEMES = ("https://", "http://", "s3://", HUB_SCHEME)
_CHUNK = 1 << 20
_TRIES = 5
_PAUSE = 1.0  # seconds before the second try, doubled for each further one
_SECONDS_WITHOUT_DATA = 60.0


class CacheError(CheckpointError):
    """The folder of downloaded weights cannot be written; another address would not help."""


class _Interrupted(Exception):
    """A transfer that broke off and can be resumed."""


class _Part(NamedTuple):
    """A stream from byte `start` on, of a file of `size` bytes (None if unknown); `version` identifies its content."""

    stream: BinaryIO
    start: int
    size: int | None
    version: str


def is_address(place: str) -> bool:
    """Whether `place` is an address rather than a path."""
    return place.startswith(_SCHEMES)


def cache_folder() -> Path:
    """The folder of downloaded weights."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dino_lightning" / "weights"


def local_file(place: str) -> Path:
    """The local file of weights; an address is downloaded unless the cache has it.

    A download that breaks off is resumed, in this run or the next.

    Args:
        place: a path, or an address beginning with https://, s3:// or hf:// (`hf://OWNER/REPO/FILE`, of the Hugging
            Face Hub; without FILE its model.ckpt), optionally with `#sha256=...` at its end:
            the checksum of the content, or its first digits, 8 at least. http:// needs the checksum, unless the server
            is this machine: anyone on the way could exchange the file. User and password in an address are sent as
            HTTP's basic authentication.

    Raises:
        CheckpointError: the file does not exist, the address cannot be read or lacks what opens it, or the checksum
            differs.
    """
    if is_address(place):
        return _downloaded(place)
    path = Path(place)
    if not path.is_file():
        raise CheckpointError(
            f"{place} does not exist: it is neither a file nor an address (https:// or s3://) nor the name of "
            "torchvision weights (such as IMAGENET1K_V2)."
        )
    return path


def hub_endpoint() -> str:
    """The address of the Hugging Face Hub, or of a mirror of it, as its own programs find it."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _hub_parts(place: str) -> tuple[str, str]:
    """hf://OWNER/REPO/FILE -> OWNER/REPO and FILE.

    Raises:
        CheckpointError: there is no owner or no repository in it.
    """
    owner, _, rest = place.removeprefix(HUB_SCHEME).partition("/")
    repository, _, file = rest.partition("/")
    if not owner or not repository:
        raise CheckpointError(f"{place}: addresses of the Hugging Face Hub have the form hf://OWNER/REPO/FILE.")
    return f"{owner}/{repository}", file or "model.ckpt"


def _by_the_hubs_client(repository: str, file: str) -> Path | None:
    """The newest version of a file through huggingface_hub, with its cache and its login; None if it cannot give it.

    Raises:
        CheckpointError: HF_HUB_OFFLINE forbids to ask elsewhere.
    """
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:
        return None
    try:
        return Path(hf_hub_download(repository, file, endpoint=hub_endpoint()))
    except Exception as error:  # of the client and of its HTTP library; the plain download says what is wrong
        if constants.HF_HUB_OFFLINE:
            raise CheckpointError(
                f"{HUB_SCHEME}{repository}/{file} is not in the cache of huggingface_hub, and HF_HUB_OFFLINE is set."
            ) from error
        return None


def downloaded_file(address: str) -> Path:
    """Where the file of an address is kept; the same file name at two places may mean two files."""
    address, _ = _without_user(address)
    name = Path(urllib.parse.urlsplit(address).path).name
    return cache_folder() / f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{name}"


@contextmanager
def interprocess_lock(name: str) -> Iterator[None]:
    """Hold a lock among the processes of this machine: the first one downloads, the others find the file."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name}.lock")
        lock.acquire()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(folder: Path, error: OSError) -> CacheError:
    return CacheError(
        f"The cache for downloaded weights, {folder}, cannot be written ({reason_of(error)}). {advice_on(error)}, or "
        "set XDG_CACHE_HOME to another folder."
    )


def _downloaded(place: str) -> Path:
    address, checksum = _split(place)
    if lacks_secrets(address):
        raise CheckpointError(f"{address}: passwords and queries of addresses are not stored; give the whole address.")
    if address.startswith(HUB_SCHEME):
        repository, file = _hub_parts(address)
        fetched = _by_the_hubs_client(repository, file)
        if fetched is not None:
            if checksum is not None and not (sha256 := sha256_of(fetched)).startswith(checksum):
                raise CheckpointError(f"{address} is not the expected file: its sha256 is {sha256}, not {checksum}.")
            return fetched
        address = f"{hub_endpoint()}/{repository}/resolve/main/{file}"
    if checksum is None and _is_plain(address):
        raise CheckpointError(
            f"{without_secrets(address)} is not encrypted, and anyone on the way could exchange the weights: give an "
            "https:// address, or append #sha256= and the checksum of the file."
        )
    path = downloaded_file(address)
    with interprocess_lock(path.name):
        if path.is_file() and checksum is not None and not sha256_of(path).startswith(checksum):
            path.unlink()  # outdated or damaged
        if not path.is_file():
            part = path.with_name(f"{path.name}.part")
            try:
                _download(address, part)
            except OSError as error:
                raise _unwritable(path.parent, error) from error
            if checksum is not None and not (found := sha256_of(part)).startswith(checksum):
                part.unlink()
                raise CheckpointError(
                    f"{without_secrets(address)} is not the expected file, and was removed: its sha256 is {found}, not "
                    f"{checksum}."
                )
            part.replace(path)
    return path


def _split(place: str) -> tuple[str, str | None]:
    """The address without its fragment, and the checksum in the fragment."""
    address, _, fragment = place.partition("#")
    if not fragment:
        return address, None
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{8,64})", fragment)
    if found is None:
        raise CheckpointError(
            f"{without_secrets(address)}: give a checksum as #sha256= and 64 hexadecimal digits, or the first 8 or "
            "more of them, after the address."
        )
    return address, found[1].lower()


def _without_user(address: str) -> tuple[str, str | None]:
    """The address without user and password, and these as a header's value for HTTP's basic authentication."""
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    if not at:
        return address, None
    encoded = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
    return urllib.parse.urlunsplit(parts._replace(netloc=host)), f"Basic {encoded}"


def _is_plain(address: str) -> bool:
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
        if req.type == "https" and _is_plain(args[-1]):
            raise CheckpointError(
                f"{without_secrets(req.full_url)} cannot be downloaded: the server redirects to an address that is not "
                f"encrypted, {without_secrets(args[-1])}."
            )
        return super().redirect_request(req, *args)


def _download(address: str, part: Path) -> None:
    """Download the address to `part` with a progress bar, resuming from the bytes in `part`."""
    reason = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        try:
            _transfer(address, part)
        except _Interrupted as error:
            reason = _scrubbed(error, address)
        else:
            return
    have = part.stat().st_size if part.exists() else 0
    kept = f"{have:,} bytes are kept, and the next run resumes from there" if have else "nothing was received"
    raise CheckpointError(f"Downloading {without_secrets(address)} failed {_TRIES} times (last: {reason}); {kept}.")


def _transfer(address: str, part: Path) -> None:
    """Append the missing bytes to `part`; a file beside it holds the version that its bytes are of."""
    version = part.with_name(f"{part.name}.version")
    known = version.read_text() if version.is_file() else ""
    have = part.stat().st_size if part.is_file() and known else 0
    opened = _open_s3(address, have, known) if address.startswith("s3://") else _open_http(address, have, known)
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


def _open_http(address: str, have: int, known: str) -> _Part:
    """The bytes after the first `have`, or all if the server cannot skip or has another version than `known`."""
    # If-Range: the server sends everything if its version is another one.
    headers = {"Range": f"bytes={have}-", "If-Range": known} if have else {}
    bare, user = _without_user(address)
    request = urllib.request.Request(bare, headers=headers)
    if user is not None:
        request.add_unredirected_header("Authorization", user)
    token = os.environ.get("HF_TOKEN")
    if token and address.startswith(f"{hub_endpoint()}/"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # not to where the file itself lies
    try:
        answer = urllib.request.build_opener(_KeepsEncryption).open(request, timeout=_SECONDS_WITHOUT_DATA)
    except CheckpointError:  # a redirection that was refused; a ValueError as well
        raise
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # there are no bytes after ours; rare, so start again
            return _open_http(address, 0, "")
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
