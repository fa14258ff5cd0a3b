"""Weights of whole detectors by name: the table in `zoo.yaml`, and their files.

The same weights give other numbers with another position embedding or clamp, which no file of them tells. So the table
has the options that the weights need, and a file of the table is known by its name, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dino_lightning.errors import CheckpointError
from dino_lightning.files import sha256_of
from dino_lightning.weights.download import CacheError, cache_folder, downloaded_file, is_address, local_file
from dino_lightning.weights.shipped import SHIPPED, shipped_file

if TYPE_CHECKING:
    from dino_lightning.weights.foreign_layouts import Layout

STRIDES = {4: [8, 16, 32], 5: [4, 8, 16, 32]}  # of the backbone's maps, by the number of levels
TABLE = Path(__file__).with_name("zoo.yaml")


@dataclass(frozen=True)
class NamedWeights:
    """One row of the table.

    Attributes:
        name: what `--model.weights` takes.
        addresses: where the file is, best first.
        sha256: the first digits of its checksum; empty where nobody states it.
        layout: `detrex` or `mmdet`.
        backbone: in words.
        levels: feature levels ("scales").
        epochs: of training on COCO.
        ap: box AP on COCO val2017, as the authors state it.
        licence: of the project; no page states another one for the weights.
        source: the project's page.
        options: arguments of `DINO` that the weights need.
    """

    name: str
    addresses: tuple[str, ...]
    sha256: str
    layout: Layout
    backbone: str
    levels: int
    epochs: int
    ap: float
    licence: str
    source: str
    options: Mapping[str, Any]

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.addresses[0].rpartition("/")[2]


@lru_cache
def zoo() -> Mapping[str, NamedWeights]:
    """The table, by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: _row(name, row, table) for name, row in table["weights"].items()}


def _row(name: str, row: Mapping[str, Any], table: Mapping[str, Any]) -> NamedWeights:
    layout, levels = table["layouts"][row["layout"]], row.get("levels", 4)
    options = {**layout["options"], **table["backbones"][row["backbone"]], **row.get("options", {})}
    base = table["bases"][row.get("base", row["layout"])]
    return NamedWeights(
        name=name,
        addresses=(base + row["file"], *row.get("mirrors", ())),
        sha256=str(row.get("sha256", "")),
        layout=row["layout"],
        backbone=row["backbone"],
        levels=levels,
        epochs=row["epochs"],
        ap=row["ap"],
        licence=layout["licence"],
        source=layout["source"],
        options={**options, "feature_strides": STRIDES[levels], "num_feature_levels": levels},
    )


def named(place: str | Path) -> NamedWeights | None:
    """The row of a name, or of a file that has the name of a row's file; None for anything else."""
    found = zoo().get(str(place))
    if found is not None:
        return found
    name = Path(place).name
    return next((row for row in zoo().values() if name == row.file or name.endswith(f"-{row.file}")), None)


def needed_options(place: str | None) -> Mapping[str, Any]:
    """The arguments of `DINO` that weights of that name, or a file of the table, need; empty for others."""
    row = None if place is None else named(place)
    return {} if row is None else row.options


def weights_file(place: str) -> Path:
    """The file of a name of the table, which is fetched if need be, of weights in this package, a path or an address.

    Raises:
        CheckpointError: it cannot be had; the message has the names that may have been meant.
    """
    row = zoo().get(place)
    if row is not None:
        return fetch(row)
    try:
        return shipped_file(place) or local_file(place)
    except CheckpointError as error:
        hint = "" if is_address(place) else names_like(place)
        raise CheckpointError(f"{error}{hint}") from error


def names_like(place: str) -> str:
    """A sentence with the names of weights that the user may have meant, after a blank; empty where none is near."""
    names = [*SHIPPED, *zoo()]
    near = [name for name in names if place.lower() in name][:3] or difflib.get_close_matches(place, names, n=3)
    return f" Did you mean {' or '.join(near)}? `python -m dino_lightning weights` lists the names." if near else ""


def by_hand(row: NamedWeights) -> Path:
    """Where a file that was fetched by hand belongs."""
    return cache_folder() / row.file


def at_hand(row: NamedWeights) -> Path | None:
    """The file of a row on this machine, or None if it has to be fetched."""
    for path in (by_hand(row), *(downloaded_file(address) for address in row.addresses)):
        if path.is_file():
            return path
    return None


def fetch(row: NamedWeights) -> Path:
    """The file of a row: at hand, or downloaded from the first of its addresses that has it; its checksum is checked.

    Raises:
        CheckpointError: no address gives the file, it is another one, or the cache cannot be written.
    """
    own = by_hand(row)
    if own.is_file():
        if not sha256_of(own).startswith(row.sha256):
            raise CheckpointError(f"{own} is not the file of {row.name}: its sha256 does not begin with {row.sha256}.")
        return own
    fragment = f"#sha256={row.sha256}" if row.sha256 else ""
    tried = []
    for address in sorted(row.addresses, key=lambda address: not downloaded_file(address).is_file()):
        try:
            return local_file(address + fragment)
        except CacheError:
            raise
        except CheckpointError as error:
            said = str(error)
            tried.append(f"  {said}" if address in said else f"  {address}: {said}")
    raise CheckpointError(
        f"The weights {row.name} could not be fetched:\n" + "\n".join(tried) + "\nFetch the file with a browser, from "
        f"there or from a page linked at {row.source}, and put it at {own}; or give another file to --model.weights."
    )
