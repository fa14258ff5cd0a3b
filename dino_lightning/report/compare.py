"""Two runs side by side: this one and the report.json of another."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dino_lightning.errors import DataError
from dino_lightning.files import unreadable
from dino_lightning.report.errors import ERROR_KINDS
from dino_lightning.report.summary import KIND, SCHEMA

JSON_NAME = "report.json"
IMAGES_SHOWN = 10  # of those that became better, and of those that became worse
VALUES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR", "F1", "F1_precision", "F1_recall")
COUNTS = ("exact", "within_one", "mean_absolute_error")
LESS_IS_BETTER = ("mean_absolute_error",)
RENAMED = {"right": "correct", "wrong_class": "classification", "wrong_place": "localization"}  # since schema 1


def find_report(place: Path, stage: str) -> Path:
    """The report.json meant by a file, the folder of a run, or a folder within it.

    Args:
        place: the path that the user gives.
        stage: "validate" or "test": which report of a run.

    Raises:
        DataError: there is none.
    """
    if place.is_file():
        return place
    for folder in (place, place / "report", place / stage / "report"):
        if (folder / JSON_NAME).is_file():
            return folder / JSON_NAME
    raise DataError(
        f"{place}: there is no {JSON_NAME} in it or in {stage}/report; name the folder of a run that "
        f"`python -m dino_lightning {stage}` has made a report of, or the file itself."
    )


def load_report(path: Path) -> dict[str, Any]:
    """The numbers of another run as `summarise` returned them, those of schema 1 under today's names.

    Raises:
        DataError: the file cannot be read, or is no report of this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {unreadable(error)}.") from error
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or no UTF-8
        raise DataError(f"{path}: is not a JSON file ({error}).") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise DataError(f"{path}: is not the {JSON_NAME} of an evaluation.")
    if content.get("schema") not in (1, SCHEMA):
        raise DataError(
            f"{path}: is a report of schema {content.get('schema')}, this version reads 1 and {SCHEMA}; "
            "evaluate that run again with this version."
        )
    try:
        content = _with_present_names(content) if content["schema"] == 1 else content
        _check(content)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is damaged ({type(error).__name__}: {error}); evaluate that run again.") from error
    return content


def _with_present_names(content: dict[str, Any]) -> dict[str, Any]:
    """A report of schema 1 with today's names of the error kinds; `both` was counted as `background` in it."""

    def renamed(row: dict[str, Any]) -> dict[str, Any]:
        return {RENAMED.get(key, key): value for key, value in row.items()}

    changed: dict[str, Any] = {name: renamed(content[name]) for name in ("at_threshold", "missed_because")}
    changed |= {name: [renamed(row) for row in content[name]] for name in ("classes", "images")}
    changed["errors"] = [row | {"kind": RENAMED.get(row["kind"], row["kind"])} for row in content["errors"]]
    changed["calibration"] = content["calibration"] | {"bins": [renamed(row) for row in content["calibration"]["bins"]]}
    return content | changed


def _check(content: dict[str, Any]) -> None:
    """Raise if a value that a comparison uses is absent or of another type."""
    for name in VALUES:
        _optional(content["values"][name])
    for name in COUNTS:
        _optional(content["counts"][name])
    str(content["annotations"])
    for number in (content["threshold"], content["num_images"], *(row["count"] for row in content["errors"])):
        float(number)
    if not {row["kind"] for row in content["errors"]} <= set(ERROR_KINDS):
        raise ValueError("errors of an unknown kind")
    for row in content["classes"]:
        str(row["name"])
        for name in ("AP", "best_f1"):
            _optional(row[name])
    for row in content["images"]:
        int(row["image_id"]), str(row["file_name"]), float(row["f1"]), int(row["true"])
    curves = content["curves"]
    for length, values in (
        (curves["recalls"], curves["precision_at_recall"]["0.50"]),
        (curves["thresholds"], (curves["at_threshold"] or {"f1": None})["f1"]),
    ):
        if values is not None and len([float(value) for value in values]) != len([float(value) for value in length]):
            raise ValueError("a curve has too few numbers")


def _optional(value: Any) -> float | None:
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise ValueError(f"{value!r} is not a number")


def compare(this: dict[str, Any], other: dict[str, Any], name: str) -> dict[str, Any]:
    """What changed from another run to this one; classes and images are matched by name, the largest changes first.

    Args:
        this: the numbers of this run.
        other: the numbers of the other run.
        name: name of the other run, as the page shows it.
    """
    classes = {row["name"]: row for row in other["classes"]}
    class_rows = [
        _row(row["name"], classes[row["name"]]["AP"], row["AP"])
        | {"f1": _row("", classes[row["name"]]["best_f1"], row["best_f1"])}
        for row in this["classes"]
        if row["name"] in classes
    ]
    counted = {row["kind"]: row["count"] for row in other["errors"]}
    without_both = other["schema"] == 1 and any(row["kind"] == "both" for row in this["errors"])
    before = {(row["image_id"], row["file_name"]): row for row in other["images"]}
    pairs = [(before.get((row["image_id"], row["file_name"])), row) for row in this["images"]]
    common = [(old, new) for old, new in pairs if old is not None]
    relabelled = sum(old["true"] != new["true"] for old, new in common)
    images = [_row(f"{new['file_name']} (image {new['image_id']})", old["f1"], new["f1"]) for old, new in common]
    images.sort(key=lambda row: row["change"])
    changed = [row for row in images if row["change"]]
    return {
        "name": name,
        "notes": _notes(this, other, len(images), relabelled, without_both=without_both),
        "values": [_row(key, other["values"][key], this["values"][key]) for key in VALUES]
        + [
            _row(key, other["counts"][key], this["counts"][key], less_is_better=key in LESS_IS_BETTER) for key in COUNTS
        ],
        "errors": [
            _row(row["kind"], counted.get(row["kind"]), row["count"], less_is_better=True)
            | ({"change": None, "improved": None} if row["kind"] == "background" and without_both else {})
            for row in this["errors"]
        ],
        "classes": sorted(class_rows, key=lambda row: -abs(row["change"] or 0)),
        "only_this": [row["name"] for row in this["classes"] if row["name"] not in classes],
        "only_other": sorted(set(classes) - {row["name"] for row in this["classes"]}),
        "num_images": len(images),
        "num_better": sum(row["change"] > 0 for row in images),
        "num_worse": sum(row["change"] < 0 for row in images),
        "worse": [row for row in changed if row["change"] < 0][:IMAGES_SHOWN],
        "better": [row for row in changed[::-1] if row["change"] > 0][:IMAGES_SHOWN],
    }


def _row(name: str, other: float | None, this: float | None, *, less_is_better: bool = False) -> dict[str, Any]:
    change = None if other is None or this is None else round(this - other, 6)
    improved = None if not change else (change > 0) != less_is_better
    return {"name": name, "other": other, "this": this, "change": change, "improved": improved}


def _notes(
    this: dict[str, Any], other: dict[str, Any], common: int, relabelled: int, *, without_both: bool
) -> list[str]:
    """Sentences about what limits the comparison."""
    notes = []
    if not common == this["num_images"] == other["num_images"]:
        notes.append(
            f"The two runs were not evaluated on the same images: {this['num_images']} here, {other['num_images']} "
            f"there, {common} in common. Except for those of single images, the numbers of each run are over "
            "all of its own images."
        )
    if relabelled:
        notes.append(
            f"{relabelled} of the {common} common images have another number of ground-truth boxes there: the "
            f"annotations were changed, or are others with the same ids and names ({this['annotations']} here, "
            f"{other['annotations']} there)."
        )
    if abs(this["threshold"] - other["threshold"]) > 1e-9:
        notes.append(
            f"Errors, counts and images are at a score threshold of {this['threshold']:.3f} here and of "
            f"{other['threshold']:.3f} there."
        )
    if this["iou_threshold"] != other.get("iou_threshold"):
        notes.append("The two runs count a detection as correct from different IoUs.")
    if without_both:
        notes.append(
            "The other report is of an earlier version, which counted detections near a box of another class (both) as "
            "background."
        )
    return notes
