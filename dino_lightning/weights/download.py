"""Local files for weights: a path as it is, an address downloaded once into a cache."""

from __future__ import annotations

import hashlib
import os
import re
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from dino_lightning.console import lacks_secrets, without_secrets
from dino_lightning.errors import CheckpointError
from dino_lightning.files import advice_on, reason_of, sha256_of
from dino_lightning.weights.transfer import download, is_unencrypted, without_user

HUB_SCHEME = "hf://"
_SCHEMES = ("https://", "http://", "s3://", HUB_SCHEME)


class CacheError(CheckpointError):
    """The folder of downloaded weights cannot be written; another address would not help."""


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
    address, _ = without_user(address)
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
    if checksum is None and is_unencrypted(address):
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
            token = os.environ.get("HF_TOKEN") if address.startswith(f"{hub_endpoint()}/") else None
            try:
                download(address, part, token)
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
