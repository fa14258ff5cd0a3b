"""Synthetic floor plans drawn from a seed, and a COCO dataset of them: the data of the demo.

A plan is a page as an estate agent prints it; the objects to detect are its rooms. `clean` plans are small and
plain, so that a tiny detector learns them in minutes on a CPU; `realistic` ones are about as hard as real plans.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image
from tqdm import tqdm

from dino_lightning.floor_plans.drawing import Page, Pen, Room
from dino_lightning.floor_plans.furnishing import furnish
from dino_lightning.floor_plans.geometry import offset
from dino_lightning.floor_plans.labels import write_name
from dino_lightning.floor_plans.layout import simple_layout
from dino_lightning.floor_plans.page import draw_page
from dino_lightning.floor_plans.scan import page_without_plan, rotate, scan
from dino_lightning.floor_plans.walls import draw_walls

Style = Literal["clean", "realistic"]

GENERATOR = "dino_lightning.data.rooms"
GENERATOR_VERSION = 1  # increased whenever the same parameters give other images
MANIFEST = "rooms.json"
SPLITS = ("train", "val")
SEEDS_PER_SPLIT = 1_000_000
DRAWN = re.compile(r"\d{6,}\.(png|jpg)")  # how images are named
LONG_SIDE = {"clean": (200, 320), "realistic": (200, 1100)}


def draw_plan(
    seed: int, *, style: Style = "clean", size: int | None = None, wings: bool = False
) -> tuple[Image.Image, list[Room]]:
    """Draw one floor plan.

    Args:
        seed: 0 or more; the same seed gives the same image, bit for bit, with the same library versions.
        style: "clean" (small, plain) or "realistic" (like the worst of what agents publish).
        size: long side of the page in pixels; None draws it from the range of the style.
        wings: whether some `realistic` homes have wings: outlines with steps. Other homes then differ, too.

    Returns:
        The page and the rooms on it.

    Raises:
        ValueError: the style is unknown, the seed is negative or the size is below 96.
    """
    if style not in get_args(Style):
        raise ValueError(f"style must be one of {get_args(Style)}, got {style!r}.")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}.")
    if size is not None and size < 96:
        raise ValueError(f"size must be at least 96 pixels, got {size}.")
    rng = np.random.default_rng((seed, get_args(Style).index(style)))
    low, high = LONG_SIDE[style]
    drawn = int(rng.integers(low, high + 1))  # always drawn, so that `size` does not change the rest of the plan
    long_side = size or drawn
    return _draw_clean(long_side, rng) if style == "clean" else _draw_realistic(long_side, rng, wings)


def _draw_realistic(long_side: int, rng: np.random.Generator, wings: bool) -> tuple[Image.Image, list[Room]]:
    """A realistic page, as printed or scanned; some pages have no plan on them."""
    rooms: list[Room] = []
    if rng.random() < 0.04:
        picture = page_without_plan(long_side, rng)
    else:
        picture, rooms = draw_page(long_side, rng, wings=wings)
    scanned = rng.random() < 0.4
    if rng.random() < (0.6 if scanned else 0.1):
        picture, rooms = rotate(picture, rooms, float(rng.uniform(-1, 1)) * math.radians(2))
    if scanned:
        picture = scan(picture, rng)
    return picture, rooms


def _draw_clean(long_side: int, rng: np.random.Generator) -> tuple[Image.Image, list[Room]]:
    short_side = round(long_side * rng.uniform(0.7, 1.0))
    width, height = (long_side, short_side) if rng.random() < 0.6 else (short_side, long_side)
    left, top, right, bottom = long_side * rng.uniform(0.03, 0.09, 4)
    num_rooms = int(rng.integers(2, 10))
    plan_width, plan_height = width - left - right, height - top - bottom
    scale = math.sqrt(plan_width * plan_height / (num_rooms * rng.uniform(9, 13)))  # pixels per metre
    inner_wall = max(0.1 * scale, long_side / 130) / scale
    layout = simple_layout(
        width=plan_width / scale,
        height=plan_height / scale,
        num_rooms=num_rooms,
        min_side=0.11 * long_side / scale,
        inner_wall=inner_wall,
        outer_wall=inner_wall * float(rng.uniform(1.8, 2.4)),
        rng=rng,
    )
    page = Page((width, height), 3)
    pen = Pen(page, scale, (left, top), hairline=long_side / 320)
    draw_walls(pen, layout)
    fullness = 0.4 if rng.random() < 0.3 else 0.0
    rooms = []
    bedrooms = 0
    for cell in layout.cells:
        bedrooms += cell.kind == "bedroom"
        outline = offset(cell.outline, layout.inner_wall / 2)
        taken = furnish(pen, layout, cell, rng, fullness)
        name = cell.kind.capitalize() + (f" {bedrooms}" if cell.kind == "bedroom" else "")
        write_name(pen, outline, name, (), taken, long_side / 30)
        rooms.append(Room(pen.to_page(outline), name))
    picture = page.finish()
    if rng.random() < 0.5:
        noise = rng.normal(0, rng.uniform(1, 5), (height, width, 1))
        picture = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
    return picture, rooms


def write_rooms_dataset(
    root: str | Path,
    *,
    num_train: int = 240,
    num_val: int = 60,
    style: Style = "clean",
    seed: int = 0,
    size: int | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a COCO dataset of plans: `root/{train,val}/annotations.json` and `root/{train,val}/images/`.

    An existing dataset with the same parameters is reused; one with other parameters is replaced unless told not to. A
    new one is built beside `root` and moved into place, so an interrupted run never leaves half a dataset.

    Args:
        root: folder of the dataset.
        num_train: number of training plans.
        num_val: number of validation plans; no seed is shared with training.
        style: see `draw_plan`.
        seed: 0 or more; another seed gives other plans.
        size: long side of the pages in pixels; None draws each from the range of the style.
        overwrite: replace a dataset of this function with other parameters.

    Returns:
        The folder, as a path.

    Raises:
        ValueError: `root` holds anything that this function did not write, or with other parameters where those are not
            to be replaced; or a parameter is out of range.
    """
    root = Path(root)
    counts = {"train": num_train, "val": num_val}
    for split, count in counts.items():
        if not 0 < count <= SEEDS_PER_SPLIT:
            raise ValueError(f"num_{split} must be between 1 and {SEEDS_PER_SPLIT}, got {count}.")
    manifest: dict[str, Any] = {
        "generator": GENERATOR,
        "version": GENERATOR_VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "style": style,
        "seed": seed,
        "size": size,
    }
    if _is_current(root, manifest, overwrite=overwrite):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        built = workplace / "new"
        progress = tqdm(
            total=num_train + num_val,
            desc=f"drawing {style} plans",
            unit="plan",
            disable=None,
            delay=3,
            leave=False,
        )
        with progress:
            for position, (split, count) in enumerate(counts.items()):
                first_seed = (seed * len(SPLITS) + position) * SEEDS_PER_SPLIT
                _write_split(built / split, first_seed, count, style, size, progress)
        (built / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        if root.exists():
            root.rename(workplace / "old")
        try:
            built.rename(root)
        except OSError:  # another process was faster, and wrote the same dataset
            if not _is_current(root, manifest, overwrite=True):
                raise
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return root


def _is_current(root: Path, manifest: dict[str, Any], *, overwrite: bool) -> bool:
    """Whether `root` already is the wanted dataset; raises ValueError if the folder holds anything else to be kept."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give a folder for the rooms dataset.")
    names = {path.relative_to(root).as_posix() for pattern in ("*", "*/*") for path in root.glob(pattern)}
    if not names:
        return False
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        found = None
    ours = {MANIFEST} | {f"{split}{part}" for split in SPLITS for part in ("", "/annotations.json", "/images")}
    if found == manifest and ours <= names:
        return True
    if not isinstance(found, dict) or found.get("generator") != GENERATOR or names - ours or not _all_drawn(root):
        raise ValueError(f"{root} holds files that are not a rooms dataset; give a new or empty folder.")
    if not overwrite:
        others = ", ".join(f"{name} {found.get(name)}" for name, value in manifest.items() if found.get(name) != value)
        raise ValueError(f"{root} holds another rooms dataset ({others}); give a new folder, or overwrite it.")
    return False


def _all_drawn(root: Path) -> bool:
    """Whether the images have the names that `_save` gives, and nothing lies among them."""
    return all(DRAWN.fullmatch(path.name) for path in root.glob("*/images/*"))


def _save(picture: Image.Image, folder: Path, stem: str, style: Style, seed: int) -> str:
    """Save a page, half of the realistic ones as JPEG of good to poor quality; returns the file's name."""
    rng = np.random.default_rng((seed, len(get_args(Style))))  # a stream that no image is drawn from
    if style == "realistic" and rng.random() < 0.5:
        picture.save(folder / f"{stem}.jpg", quality=int(rng.integers(35, 91)))
        return f"{stem}.jpg"
    picture.save(folder / f"{stem}.png")
    return f"{stem}.png"


def _write_split(
    folder: Path, first_seed: int, count: int, style: Style, size: int | None, progress: tqdm[Any]
) -> None:
    """Write the images of one split and, after them, their annotations."""
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        picture, rooms = draw_plan(first_seed + index, style=style, size=size)
        file_name = _save(picture, folder / "images", f"{index + 1:06d}", style, first_seed + index)
        images.append({"id": index + 1, "file_name": file_name, "width": picture.width, "height": picture.height})
        for room in rooms:
            x0, y0, x1, y1 = room.bbox_xyxy
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": room.area,
                    "segmentation": [[value for point in room.polygon for value in point]],
                    "iscrowd": 0,
                }
            )
        progress.update()
    content = {
        "info": {"description": f"Synthetic {style} floor plans", "version": str(GENERATOR_VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "room", "supercategory": "plan"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content) + "\n")
