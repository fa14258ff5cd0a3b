"""Datasets in the format of Pascal VOC, read as COCO documents."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dino_lightning.console import bar_seconds
from dino_lightning.data.image_files import FEW_IMAGES, is_image
from dino_lightning.data.other_formats.image_folder import counted, displayed_sizes, first_of, names_in
from dino_lightning.data.other_formats.voc_file import VocFile, VocObject, read_voc_file
from dino_lightning.data.other_formats.voc_layout import (
    BOTH,
    files_of_list,
    image_folders,
    split_folders,
    split_lists,
    xml_folder,
    xml_names,
)
from dino_lightning.data.reading.json_file import shown_value
from dino_lightning.data.split_files import SplitFiles, is_file
from dino_lightning.errors import DataError

LABEL_MAP = "labelmap.txt"

DECIMALS = 4  # of a pixel


def find_voc(root: Path) -> dict[str, SplitFiles]:
    """Find the splits of a Pascal VOC dataset: by its lists, or by folders of XML files beside their images.

    Args:
        root: the dataset folder.

    Returns:
        The splits found, by name: "train", "val", "test"; empty if the folder is no such dataset. The file names of
        `read_voc` are relative to `root`.

    Raises:
        DataError: a file is a link that leads out of the folder.
    """
    root = Path(root)
    folder = xml_folder(root)
    places = split_folders(root) if folder is None else (split_lists(root) or {"train": folder})
    return {split: SplitFiles(root / place, root, split) for split, place in places.items()}


def read_voc(files: SplitFiles) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Read one split of a Pascal VOC dataset as a COCO document.

    All XML files of the dataset are read, whatever the split: they say which classes there are, and whether corners
    are counted from 0 or from 1.

    Args:
        files: the split, as `find_voc` gives it.

    Returns:
        The document: images with ids 1..N in the order of their paths, annotations with ids 1..M and boxes
        x, y, width, height in pixels, difficult ones with `iscrowd` 1, and the sorted names as categories 1..K. And
        sentences about what was decided or read as something else.

    Raises:
        DataError: something is wrong with the files; names the file and the object, and says what to do.
    """
    root = files.images
    shared = xml_folder(root)
    folders = [shared] if shared is not None else list(split_folders(root).values())
    contents = _read_all(root, folders)
    notes: list[str] = []
    if files.annotations.suffix == ".txt":
        listed = _listed(root, files, {posixpath.basename(place) for place in contents}, notes)
        chosen = [posixpath.join(shared or "", name) for name in listed]
    else:
        folder = files.annotations.resolve()
        chosen = [place for place in contents if (root / place).parent.resolve() == folder]
    if not chosen:
        raise DataError(f"{files.annotations}: names no images. Leave it out, or fill it.")

    objects = [thing for content in contents.values() for thing in content.objects]
    names = sorted({thing.name for thing in objects})
    if not names:
        raise DataError(
            f"{files.annotations}: not one of its {len(contents)} XML files has an object. Export them again."
        )
    ids = {name: number for number, name in enumerate(names, 1)}
    at_zero = any(min(thing.corners[:2]) < 1 for thing in objects)
    from_zero = at_zero or is_file(root / LABEL_MAP)
    images = _images_of(root, {place: contents[place] for place in chosen}, notes)
    sizes = _sizes(root, images, contents, files.part or "train", notes)
    if files.annotations.suffix != ".txt":
        notes += _without_xml(root, images)
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    document["categories"] = [{"id": ids[name], "name": name, "supercategory": ""} for name in names]
    for image_id, (image, place) in enumerate(sorted(images.items()), 1):
        height, width = sizes[image]
        document["images"].append({"id": image_id, "file_name": image, "width": width, "height": height})
        for thing in contents[place].objects:
            number = len(document["annotations"]) + 1
            document["annotations"].append(_annotation(number, image_id, ids[thing.name], thing, from_zero))
    notes.append(
        "A corner at 0 or less occurs, so corners are taken as counted from 0."
        if at_zero
        else f"There is a {LABEL_MAP}, as CVAT and Datumaro write it, so corners are taken as counted from 0."
        if from_zero
        else "Corners are taken as counted from 1, as Pascal VOC counts, for none is at 0 or less."
    )
    if difficult := sum(entry["iscrowd"] for entry in document["annotations"]):
        what = "is read as a crowd region" if difficult == 1 else "are read as crowd regions"
        notes.append(
            f"{counted(difficult, 'difficult object')} {what}: nothing is learnt from it, and evaluation ignores it."
        )
    return document, tuple(notes)


def _read_all(root: Path, folders: Sequence[str]) -> dict[str, VocFile]:
    """The content of all XML files of the dataset by their places."""
    places = [posixpath.join(folder, name) for folder in folders for name in xml_names(root, folder)]
    few = len(places) <= FEW_IMAGES
    bar = tqdm(places, "Reading XML files", unit="file", disable=few, mininterval=bar_seconds())
    return {place: read_voc_file(root / place) for place in bar}


def _listed(root: Path, files: SplitFiles, xml_files: set[str], notes: list[str]) -> list[str]:
    """The XML files that the list of a split names."""
    places = split_lists(root)
    listed = files_of_list(files.annotations, root, xml_files)
    if files.annotations.stem == BOTH and "val" in places:
        held_out = set(files_of_list(root / places["val"], root, xml_files))
        if number := sum(name in held_out for name in listed):
            what = "is" if number == 1 else "are"
            notes.append(f"{counted(number, 'image')} that {places['val']} lists too {what} left out.")
        listed = [name for name in listed if name not in held_out]
    return listed


def _images_of(root: Path, contents: Mapping[str, VocFile], notes: list[str]) -> dict[str, str]:
    """The image that each XML file describes: image -> XML file.

    Raises:
        DataError: there is no such image, or two files describe the same one.
    """
    folders = {folder: image_folders(root, folder) for folder in {posixpath.dirname(place) for place in contents}}
    present = {place: names_in(root / place, root) for places in folders.values() for place in places}
    stems = {
        place: {posixpath.splitext(x)[0]: x for x in sorted(names) if is_image(x)} for place, names in present.items()
    }
    by_filename: dict[str, str] = {}
    by_stem: dict[str, str] = {}
    for place, content in contents.items():
        stem = posixpath.splitext(posixpath.basename(place))[0]
        for folder in reversed(folders[posixpath.dirname(place)]):  # the likeliest one is the last to be written
            if content.image in present[folder]:
                by_filename[place] = posixpath.join(folder, content.image)
            if stem in stems[folder]:
                by_stem[place] = posixpath.join(folder, stems[folder][stem])
    if absent := [place for place in contents if place not in by_filename and place not in by_stem]:
        more = f" (And {len(absent) - 1} more such files.)" if len(absent) > 1 else ""
        name = shown_value(contents[absent[0]].image)
        raise DataError(
            f"{root / absent[0]}: its image {name} does not exist, nor one with the name of the XML file. Add the "
            f"image, or remove the file.{more}"
        )
    claims = Counter(by_filename.values())
    images: dict[str, str] = {}
    misnamed = []
    for place, content in contents.items():
        image = by_filename.get(place)
        if image is None or (claims[image] > 1 and place in by_stem):  # LabelImg's filename is often another file's
            image = by_stem[place]
        if posixpath.basename(image) != content.image:
            misnamed.append(place)
        if image in images:
            raise DataError(f"{root / place}: describes {image}, as {images[image]} does. Remove one of the two files.")
        images[image] = place
    if misnamed:
        what = "does not name its image in filename" if len(misnamed) == 1 else "do not name their image in filename"
        notes.append(
            f"{counted(len(misnamed), 'XML file')} {what}; the one with the name of the XML file is taken: "
            f"{first_of(misnamed)}."
        )
    return images


def _sizes(
    root: Path, images: Mapping[str, str], contents: Mapping[str, VocFile], part: str, notes: list[str]
) -> dict[str, tuple[int, int]]:
    """(height, width) of each image: by its XML file, or else by its own header, as displayed."""
    sizes = {image: size for image, place in images.items() if (size := contents[place].size) is not None}
    unknown = [image for image in sorted(images) if image not in sizes]
    if unknown:
        sizes.update(zip(unknown, displayed_sizes([root / image for image in unknown], f"{part} images"), strict=True))
        what = "says no size; that of the image is" if len(unknown) == 1 else "say no size; those of the images are"
        notes.append(f"{counted(len(unknown), 'XML file')} {what} taken.")
    return sizes


def _without_xml(root: Path, images: Mapping[str, str]) -> list[str]:
    """A note on images that no XML file describes, which may have objects: they are left out."""
    folders = {posixpath.dirname(image) for image in images}
    files = {
        posixpath.join(folder, name) for folder in folders for name in names_in(root / folder, root) if is_image(name)
    }
    others = sorted(files - images.keys())
    if not others:
        return []
    what = "has no XML file and is" if len(others) == 1 else "have no XML file and are"
    return [f"{counted(len(others), 'image')} {what} left out: {first_of(others)}."]


def _annotation(number: int, image_id: int, category: int, thing: VocObject, from_zero: bool) -> dict[str, Any]:
    x1, y1, x2, y2 = thing.corners
    if not from_zero:  # pixel 1 is the first one, and the last one belongs to the box
        x1, y1 = x1 - 1, y1 - 1
    width, height = round(x2 - x1, DECIMALS), round(y2 - y1, DECIMALS)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": [x1, y1, width, height],
        "area": round(width * height, DECIMALS),
        "iscrowd": int(thing.difficult),
    }
