"""What `predict` leaves in a folder, and how an interrupted one is resumed.

Each process appends a line of JSON for each finished image to a file of its own. In the end these become
`predictions.jsonl` and, from it, the files for other programs. Both kinds of lines are what the next start of the same
command finds finished. Nothing is held in memory but the names and where their lines are.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from dino_lightning.data.image_files import has_further_pages, open_image
from dino_lightning.detections import COLUMNS, Detections
from dino_lightning.files import atomic_write, csv_cell
from dino_lightning.inference.image_list import ListedImage

SETTINGS = "settings.json"
LOCK = ".predict.lock"
RECORDS = "predictions.jsonl"
OVERLAYS = "overlays"
PICTURE = "overlay"  # in the line of an image: the path of its picture in the folder
RESULTS = ("predictions.json", "predictions.csv", "images.json", RECORDS)
LATER_SETTINGS = ("precision",)  # results from before they were noted can still be resumed
OF_PAGES = (".tif", ".tiff", ".gif", ".webp")  # names of files that may have several
FAILURES_KEPT = 5  # to be shown


class Place(NamedTuple):
    """Where the line of an image is."""

    path: Path
    offset: int
    failed: bool


@dataclass
class Summary:
    """What came out.

    Attributes:
        threshold: the lowest score reported.
        images: images read.
        detections: in all of them.
        failed: images that could not be read.
        failures: the first reasons.
        other_size: images whose size is not the one that the COCO file says.
        further_pages: files of several pages, of which only the first was looked at.
        done_now: images that this call predicted or gave up, without those that were finished before.
        seconds: from the first image read to the last file written, without loading the model.
    """

    threshold: float = 0.0
    images: int = 0
    detections: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    other_size: int = 0
    further_pages: int = 0
    done_now: int = 0
    seconds: float = 0.0


def record(
    listed: ListedImage, size: tuple[int, int], detections: Detections, picture: str | None = None
) -> dict[str, Any]:
    """The line of an image of (height, width); `picture` is the path of its picture in the folder, if it has one."""
    found = detections.to_dict()["detections"]
    for entry in found:
        entry["score"] = round(entry["score"], 6)
        entry["box"] = [round(value, 3) for value in entry["box"]]
    drawn = {} if picture is None else {PICTURE: picture}
    return {**_identity(listed), "width": size[1], "height": size[0], **drawn, "detections": found}


def failure(listed: ListedImage, reason: str) -> dict[str, Any]:
    """The line of an image that could not be read."""
    return {**_identity(listed), "error": reason}


def _identity(listed: ListedImage) -> dict[str, Any]:
    return {"file": listed.name, **listed.stamp._asdict()}


class Records:
    """The lines of one process, each on disk when `add` returns.

    Args:
        folder: that of the results.
        process: the number of the process.
    """

    def __init__(self, *, folder: Path, process: int) -> None:
        self.folder = folder
        path = folder / f"predictions.rank{process}.jsonl.part"
        _cut_torn_line(path)
        self._file: IO[str] = path.open("a", encoding="ascii")

    def add(self, line: Mapping[str, Any]) -> None:
        """Append an image."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more will come."""
        self._file.close()


def _cut_torn_line(path: Path) -> None:
    """What a process that was killed had not finished writing."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
            end = start
        file.truncate(0)


def finished(folder: Path, images: Iterable[ListedImage]) -> dict[str, Place]:
    """Those of the images that have a line, by name; of several, one that did not fail counts.

    A line of another file of the same name does not count, nor one from before the file was changed.
    """
    identities = {image.name: _identity(image) for image in images}
    places: dict[str, Place] = {}
    for path, offset, content in _lines(folder):
        identity = identities.get(content["file"])
        if identity is None or not identity.items() <= content.items():
            continue
        failed = "error" in content
        if not failed or content["file"] not in places:
            places[content["file"]] = Place(path, offset, failed)
    return places


def in_the_way(folder: Path, sources: Iterable[str], *, overwrite: bool) -> str | None:
    """Why results cannot be written into a folder: files of somebody else have the names of ours. None if none does.

    Args:
        folder: that of the results.
        sources: the files and folders given as images.
        overwrite: earlier results are to be deleted, which are not looked at then.
    """
    places = [folder / name for name in (*RESULTS, SETTINGS)]
    given = {Path(os.path.realpath(source)) for source in sources}
    for place in places:
        if Path(os.path.realpath(place)) in given:
            return f"{place} was given as --images, and results would replace it; give another --output."
    if overwrite:
        return None
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        ours = isinstance(settings, dict) and "model" in settings
    except (OSError, ValueError):
        ours = False
    there = [place.name for place in places if place.is_file() and not ours]
    if there and not (folder / RECORDS).is_file():
        return (
            f"{folder} holds {there[0]}, which is not of predict; give another --output, or --overwrite to replace it."
        )
    return None


def other_images(folder: Path, images: Iterable[ListedImage]) -> list[str]:
    """The names of images with results in the folder that are none of these files."""
    paths = {image.stamp.path for image in images}
    others = (line["file"] for *_, line in _lines(folder) if "error" not in line and line.get("path") not in paths)
    return list(dict.fromkeys(others))


def _lines(folder: Path) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """All lines, with the file of each and its place there."""
    for path in [folder / RECORDS, *sorted(folder.glob("predictions.rank*.jsonl.part"))]:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if line.endswith(b"\n"):  # else it is torn
                    yield path, offset, json.loads(line)
                offset += len(line)


def settings_differ(folder: Path, settings: Mapping[str, Any]) -> list[str]:
    """The names of the settings that earlier results in the folder had otherwise; none if there are no results."""
    results = [folder / RECORDS, *folder.glob("predictions.rank*.jsonl.part")]
    if not any(path.is_file() for path in results):
        return []
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["all of them"]
    different = [name for name, value in settings.items() if name not in before or before[name] != value]
    return [name for name in different if name in before or name not in LATER_SETTINGS]


def prepare(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder, without earlier results if they are to be overwritten, and note the settings."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for path in [*(folder / name for name in RESULTS), *folder.glob("predictions.rank*.jsonl.part")]:
            path.unlink(missing_ok=True)
        if (folder / SETTINGS).is_file():  # else the pictures may be somebody else's
            shutil.rmtree(folder / OVERLAYS, ignore_errors=True)
    with atomic_write(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(dict(settings), indent=1) + "\n", encoding="utf-8")


def write_results(folder: Path, images: Sequence[ListedImage], categories: Mapping[int, str]) -> Summary:
    """Make of all lines the files for other programs, in the order of `images`; then the lines become one file.

    Args:
        folder: that of the results.
        images: the images; lines of others are left out, and one without a line counts as failed.
        categories: the name of each category id.
    """
    places, summary = finished(folder, images), Summary()
    with ExitStack() as whole:
        # replaced in the opposite order: the lines last, so that whatever interrupts this can be done again
        paths = {name: whole.enter_context(atomic_write(folder / name)) for name in reversed(RESULTS)}
        with ExitStack() as opened:
            sources = {
                path: opened.enter_context(path.open("rb")) for path in {place.path for place in places.values()}
            }
            files = {
                name: opened.enter_context(path.open("w", encoding="utf-8", errors="backslashreplace", newline=""))
                for name, path in paths.items()
            }
            table = csv.writer(files["predictions.csv"])
            table.writerow((COLUMNS[0], "image_id", *COLUMNS[1:]))
            results = _JsonList(files["predictions.json"], "[", "]")
            entries = _JsonList(files["images.json"], '{"images": [', "], ")
            written: set[str] = set()
            for image in images:
                place = places.get(image.name)
                if place is None:
                    content = failure(image, f"{image.path} has no result; the next run tries it again.")
                else:
                    source = sources[place.path]
                    source.seek(place.offset)
                    line = source.readline()
                    content = json.loads(line)
                    if image.name not in written:
                        files[RECORDS].write(line.decode("ascii"))
                        written.add(image.name)
                entries.add(_image_entry(image, content))
                _count(summary, image, content)
                for found in content.get("detections", ()):
                    x1, y1, x2, y2 = found["box"]
                    bbox = [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)]
                    common = {"image_id": image.image_id, "category_id": found["category_id"]}
                    results.add({**common, "bbox": bbox, "score": found["score"]})
                    row = (found["name"], found["category_id"], found["score"], *found["box"])
                    table.writerow(map(csv_cell, (image.name, image.image_id, *row)))
            results.close()
            entries.close()
            listed = [{"id": category_id, "name": name} for category_id, name in categories.items()]
            files["images.json"].write(f'"categories": {json.dumps(listed)}}}\n')
    for path in folder.glob("predictions.rank*.jsonl.part"):
        path.unlink()
    return summary


def _has_further_pages(path: Path) -> bool:
    try:
        with open_image(path) as opened:
            return has_further_pages(opened)
    except Exception:  # gone or replaced since; decoders raise anything on damaged files
        return False


class _JsonList:
    """A JSON list written one entry at a time, a line for each."""

    def __init__(self, file: IO[str], opening: str, closing: str) -> None:
        self._file = file
        self._before = f"{opening}\n"
        self._closing = closing
        self._empty = opening + closing

    def add(self, entry: Mapping[str, Any]) -> None:
        self._file.write(self._before + json.dumps(entry))
        self._before = ",\n"

    def close(self) -> None:
        self._file.write("\n" + self._closing if self._before == ",\n" else self._empty)
        self._file.write("\n" if self._closing == "]" else "")


def _image_entry(image: ListedImage, content: Mapping[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = {"id": image.image_id, "file_name": image.name}
    if "error" in content:
        return {**entry, "error": content["error"]}
    size = {"width": content["width"], "height": content["height"]}
    return {**entry, **size, "detections": len(content["detections"])}


def _count(summary: Summary, image: ListedImage, content: Mapping[str, Any]) -> None:
    if "error" in content:
        summary.failed += 1
        if len(summary.failures) < FAILURES_KEPT:
            summary.failures.append(content["error"])
        return
    summary.images += 1
    summary.detections += len(content["detections"])
    summary.further_pages += image.path.suffix.lower() in OF_PAGES and _has_further_pages(image.path)
    summary.other_size += image.size is not None and image.size != (content["height"], content["width"])
