"""The detections of one image: printed, drawn, and converted for other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dino_lightning.console import say
from dino_lightning.errors import DataError, UsageError
from dino_lightning.files import atomic_write
from dino_lightning.visualization.overlay import draw_boxes, to_page

LISTED = 20  # detections that a printed table shows
LONGEST_NAME = 24  # of a class, in a printed table
SMALL_PICTURE = 480  # pixels: smaller ones are enlarged, or captions would hide them
NOTEBOOK_SIDE = 1000  # pixels of a picture that a notebook keeps
SHOWN_SIDE = 2400  # pixels of a picture in a window
COLUMNS = ("file", "name", "category_id", "score", "x1", "y1", "x2", "y2")


@dataclass(repr=False)
class Detections:
    """The detections of one image, best first. Not frozen, as Lightning's functions for collections refuse such.

    Attributes:
        boxes_xyxy: (N, 4) float32, corners in pixels of the original image.
        scores: (N,) float32, 0-1.
        labels: (N,) int64, contiguous labels 0..K-1.
        class_names: the name of each label.
        category_ids: the original COCO `category_id` of each label.
        file: the image file, where they come from one.
        read_pixels: gives the image again, (3, H, W) uint8 RGB, so that they can draw themselves.
        image_id: the id of the image in its COCO file, where they come from a `Batch`.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    file: str | None = None
    read_pixels: Callable[[], Tensor] | None = field(default=None, compare=False)
    image_id: int | None = None

    def __len__(self) -> int:
        return int(self.scores.shape[0])

    def __repr__(self) -> str:
        """A table, best first, with corners in whole pixels."""
        lines = [self._heading()]
        rows = list(zip(self.names, self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True))[:LISTED]
        if rows:
            width = min(LONGEST_NAME, max(len("name"), *(len(_printable(name)) for name, _, _ in rows)))
            lines.append(f"  {'name':<{width}}  score      x1      y1      x2      y2")
            lines += [
                f"  {_printable(name)[:width]:<{width}}  {score:5.3f}  " + "  ".join(f"{value:6.0f}" for value in box)
                for name, score, box in rows
            ]
        if len(self) > LISTED:
            lines.append(f"  ... and {len(self) - LISTED} more")
        return "\n".join(lines)

    def _heading(self) -> str:
        count = "no detections" if not len(self) else "1 detection" if len(self) == 1 else f"{len(self)} detections"
        if self.file is None and self.image_id is None:
            return count
        return f"{count} in {f'image {self.image_id}' if self.file is None else _printable(self.file)}"

    def _repr_html_(self) -> str:
        """For notebooks: the picture, where the image is known, and a table."""
        from dino_lightning.visualization.notebook import as_html

        rows = [
            (name, f"{score:.3f}", *(f"{value:.0f}" for value in box))
            for name, score, box in zip(self.names, self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True)
        ]
        return as_html(self._heading(), self._picture(), rows[:LISTED], max(0, len(rows) - LISTED))

    def _repr_png_(self) -> bytes | None:
        """For notebooks without HTML: the picture, where the image is known."""
        from dino_lightning.visualization.notebook import png

        page = self._picture()
        return None if page is None else png(page)

    def _picture(self) -> Image.Image | None:
        """The picture for a notebook; None where the image is not known, or cannot be read any more."""
        try:
            return None if self.read_pixels is None else self.draw(long_side=NOTEBOOK_SIDE)
        except (DataError, OSError):
            return None

    @property
    def names(self) -> list[str]:
        """The class name of each detection (the label's number where no name is known)."""
        return [self.class_names[label] if self.class_names else str(label) for label in self.labels.tolist()]

    def above(self, threshold: float) -> Detections:
        """Only the detections with a score of at least `threshold`.

        Raises:
            ValueError: `threshold` is NaN.
        """
        if threshold != threshold:
            raise ValueError("The threshold is NaN; give a score.")
        return self.chosen(self.scores >= threshold)

    def chosen(self, which: Tensor) -> Detections:
        """Only those that `which` names: (N,) bool, or indices in the order to give them in."""
        return replace(self, boxes_xyxy=self.boxes_xyxy[which], scores=self.scores[which], labels=self.labels[which])

    def within(self, size: tuple[int, int]) -> Detections:
        """Boxes clipped to the image, as they leave the program; evaluation compares them as the model gives them.

        A box of which nothing is left, with no width or no height in the image, is dropped.

        Args:
            size: (height, width) in pixels of the image.
        """
        height, width = size
        corners = self.boxes_xyxy.new_tensor([width, height, width, height])
        clipped = replace(self, boxes_xyxy=self.boxes_xyxy.clamp(min=0).minimum(corners))
        return clipped.chosen((clipped.boxes_xyxy[:, 2:] > clipped.boxes_xyxy[:, :2]).all(dim=1))

    def cpu(self) -> Detections:
        """The same detections on the host."""
        return self.to("cpu")

    def to(self, device: torch.device | str) -> Detections:
        """The same detections on another device."""
        boxes_xyxy, scores, labels = (each.to(device) for each in (self.boxes_xyxy, self.scores, self.labels))
        return replace(self, boxes_xyxy=boxes_xyxy, scores=scores, labels=labels)

    # ------------------------------------------------------------------ to other programs

    def to_coco(self, image_id: int | None = None) -> list[dict[str, int | float | list[float]]]:
        """Entries of a COCO results file: original category ids, boxes as x, y, width, height in pixels.

        Args:
            image_id: of the image in its COCO file; by default `image_id` of these detections.

        Raises:
            ValueError: no image id, and none is known.
        """
        image_id = self.image_id if image_id is None else image_id
        if image_id is None:
            raise ValueError("These detections do not know their image's id; give it: detections.to_coco(image_id).")
        return [
            {
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": score,
            }
            for category_id, score, (x1, y1, x2, y2) in zip(
                self._category_ids(), self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the file, and for each detection `name`, `category_id`, `score`, `box` (x1, y1, x2, y2)."""
        return {
            "file": self.file,
            "detections": [
                {"name": name, "category_id": category_id, "score": score, "box": box}
                for name, category_id, score, box in zip(
                    self.names, self._category_ids(), self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True
                )
            ],
        }

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, one row for each detection, with the columns of the CSV file that `predict` writes.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: python -m pip install pandas") from error
        rows = [
            (self.file, name, category_id, score, *box)
            for name, category_id, score, box in zip(
                self.names, self._category_ids(), self.scores.tolist(), self.boxes_xyxy.tolist(), strict=True
            )
        ]
        numbers = {"category_id": "int64", **dict.fromkeys(("score", "x1", "y1", "x2", "y2"), "float64")}
        return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(numbers)  # without rows it would not know them

    def to_supervision(self) -> Any:
        """A `supervision.Detections`, with labels as `class_id`, and `class_name` and `category_id` in its data.

        Raises:
            ImportError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs supervision: python -m pip install supervision") from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy.float().numpy(force=True).reshape(-1, 4),
            confidence=self.scores.float().numpy(force=True),
            class_id=self.labels.numpy(force=True).astype(int),
            data={
                "class_name": np.array(self.names, dtype=str),
                "category_id": np.array(self._category_ids(), dtype=np.int64),
            },
        )

    def _category_ids(self) -> list[int]:
        return [self.category_ids[label] if self.category_ids else label for label in self.labels.tolist()]

    # ------------------------------------------------------------------ pictures

    def draw(
        self, image: Image.Image | npt.NDArray[np.uint8] | Tensor | None = None, *, long_side: int | None = None
    ) -> Image.Image:
        """The image with its detections: boxes, names and scores; a small image is enlarged, by a whole number.

        Args:
            image: the image; by default, the one that they come from.
            long_side: scale the picture down to this many pixels before drawing, where it is larger.

        Raises:
            ValueError: no image, and none is known.
        """
        if image is None:
            if self.read_pixels is None:
                raise ValueError("These detections do not know their image; give it: detections.draw(image).")
            image = self.read_pixels()
        page = to_page(image)
        full = page.size
        inside = self.within((page.height, page.width))
        if long_side is not None and max(full) > long_side:
            page.thumbnail((long_side, long_side), Image.Resampling.BILINEAR)
        elif max(full) < SMALL_PICTURE:
            factor = -(-SMALL_PICTURE // max(full))
            page = page.resize((full[0] * factor, full[1] * factor), Image.Resampling.NEAREST)
        boxes_xyxy = inside.boxes_xyxy.double().cpu()
        boxes_xyxy = boxes_xyxy * boxes_xyxy.new_tensor([page.width / full[0], page.height / full[1]] * 2)
        captions = [f"{name} {score:.2f}" for name, score in zip(inside.names, inside.scores.tolist(), strict=True)]
        draw_boxes(page, boxes_xyxy.tolist(), inside.labels.tolist(), captions)
        return page

    def show(self, image: Image.Image | npt.NDArray[np.uint8] | Tensor | None = None) -> None:
        """Show the picture that `draw` gives: in the notebook, or in a window; without a screen, say where its file is.

        Raises:
            ValueError: no image, and none is known.
        """
        from dino_lightning.visualization.notebook import show_page

        path = show_page(self.draw(image, long_side=SHOWN_SIDE))
        if path is not None:
            say(f"There is no screen to show the picture on; it is in {path}.")

    def save(self, path: str | Path, image: Image.Image | npt.NDArray[np.uint8] | Tensor | None = None) -> None:
        """Write the picture that `draw` gives; the suffix of `path` decides on the format.

        Raises:
            ValueError: no image, and none is known; or a suffix that Pillow does not know.
        """
        save_page(self.draw(image), Path(path))


def save_page(page: Image.Image, path: Path) -> None:
    """Write an image atomically: the file is complete or absent."""
    with atomic_write(path) as temporary:
        # Each format ignores what it does not know. A PNG of level 2 takes a third of the time of the default, 6; those
        # of drawn plans are no larger.
        page.save(temporary, quality=90, compress_level=2)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def check_score_threshold(value: Any) -> float:
    """A threshold for scores, as a plain number.

    Raises:
        UsageError: it is no number from 0 to 1.
    """
    single = isinstance(value, int | float | np.number) or (isinstance(value, Tensor) and value.ndim == 0)
    if isinstance(value, bool) or not single or not 0 <= value <= 1:
        raise UsageError(f"threshold is {value!r}; it must be a number between 0 and 1.")
    return float(value)
