"""Where the pictures of `predict` lie, and which of them are missing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from dino_lightning.inference.image_list import ListedImage
from dino_lightning.inference.results import OVERLAYS, PICTURE, finished

LONGEST_NAME = 230  # bytes in the name of a picture; file systems have room for 255


def overlay_paths(folder: Path, images: Iterable[ListedImage]) -> dict[str, Path]:
    """Where the picture of each image goes, by name: the folders of the images, without what they have in common."""
    parts = {image.name: Path(image.name).parts for image in images}
    common = 0
    shortest = min(map(len, parts.values()), default=1) - 1
    while common < shortest and len({names[common] for names in parts.values()}) == 1:
        common += 1
    paths: dict[str, Path] = {}
    taken: set[Path] = set()
    for name, names in parts.items():
        inside = [part if part != ".." else "up" for part in names[common:] if part != Path(part).anchor]
        path = folder / OVERLAYS / Path(*inside)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            path = path.with_name(f"{path.name}.png")
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            path = path.with_name(f"{path.name[:50]}{path.suffix}")
        number = 2
        free = path
        while free in taken:
            free = path.with_name(f"{path.stem}.{number}{path.suffix}")
            number += 1
        taken.add(free)
        paths[name] = free
    return paths


def missing_pictures(
    folder: Path, images: Iterable[ListedImage], pictures: Mapping[str, Path]
) -> dict[str, Path | None]:
    """Finished images whose picture is not where it belongs: it is gone, or further images have moved its place.

    Args:
        folder: that of the results.
        images: all images.
        pictures: where the picture of each belongs, by name.

    Returns:
        By name, the picture of it that lies where no picture belongs now, if there is one.
    """
    taken, missing = set(pictures.values()), dict[str, Path | None]()
    for name, place in finished(folder, images).items():
        if place.failed or name not in pictures:
            continue
        with place.path.open("rb") as file:
            file.seek(place.offset)
            drawn = Path(json.loads(file.readline()).get(PICTURE, ""))
        ours = drawn.parts[:1] == (OVERLAYS,) and ".." not in drawn.parts
        before = folder / drawn if ours else pictures[name]  # lines of earlier versions do not say it
        if before != pictures[name] or not before.is_file():
            missing[name] = None if before in taken else before
    return missing
