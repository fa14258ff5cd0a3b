"""What kind of mistake each detection is, and why a true box was missed.

After the idea of TIDE (arXiv 2008.08115), at one score threshold and in plain words. A detection is *kept* if its score
reaches the threshold. The kept detections are matched to the true boxes as for F1 (`dino_lightning.metrics.curves`);
each is of the first kind that fits:

- `right`: it took a true box of its class, which it overlaps by at least `iou_threshold` (0.5).
- `ignored`: it fits only a crowd region of its class, and counts neither way.
- `duplicate`: it overlaps a true box of its class that much, but a better detection took it.
- `wrong_class`: it overlaps a true box of another class that much.
- `wrong_place`: it overlaps a true box of its class by at least `NEARBY` (0.1).
- `background`: it is on none of these.

A true box that no kept detection took is `missed`. So right + missed are all true boxes, and right + the four other
kinds are all detections that count. Why a box was missed is the first of these that fits:

- `wrong_class`: a detection of that kind is in its place.
- `wrong_place`: a detection of that kind is near it.
- `low_score`: a detection below the threshold would have found it.
- `unseen`: nothing points to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dino_lightning.metrics import EvaluatedImage, assign_detections, coco_overlaps

NEARBY = 0.1  # IoU
FALSE_KINDS = ("duplicate", "wrong_class", "wrong_place", "background")
ERROR_KINDS = ("missed", *FALSE_KINDS)
REASONS = ("wrong_class", "wrong_place", "low_score", "unseen")


@dataclass(frozen=True)
class ClassifiedDetection:
    """A kept detection.

    Attributes:
        index: its place in `EvaluatedImage`.
        label: its class.
        kind: "right", "ignored" or one of `FALSE_KINDS`.
        about: the place of the true box it took, repeats, mistakes or is near; -1 for none.
        overlap: IoU with that box, 0 for none.
        instead_of: for `wrong_class` and `wrong_place`, the missed true box that it would take if it were put right
            (each box once, the best score first); -1 if there is none left.
    """

    index: int
    label: int
    kind: str
    about: int
    overlap: float
    instead_of: int


@dataclass(frozen=True)
class Missed:
    """A true box that was not found: its place in the truth, its class and one of `REASONS`."""

    index: int
    label: int
    reason: str


@dataclass(frozen=True)
class ClassifiedImage:
    """The detections and the true boxes of one image.

    Attributes:
        detections: those kept, best first.
        missed: the true boxes not found.
        num_boxes: true boxes, crowd regions left out.
    """

    detections: tuple[ClassifiedDetection, ...]
    missed: tuple[Missed, ...]
    num_boxes: int

    def count(self, kind: str) -> int:
        """How many there are of a kind."""
        return len(self.missed) if kind == "missed" else sum(one.kind == kind for one in self.detections)

    @property
    def num_counted(self) -> int:
        """Detections that count."""
        return len(self.detections) - self.count("ignored")

    @property
    def num_errors(self) -> int:
        """Missed boxes and detections that are not right."""
        return sum(map(self.count, ERROR_KINDS))

    @property
    def f1(self) -> float:
        """0-1; 1 where there is nothing to find and nothing was found."""
        return f1_of(self.count("right"), self.num_counted - self.count("right"), len(self.missed))


def classify_image(image: EvaluatedImage, *, threshold: float, iou_threshold: float = 0.5) -> ClassifiedImage:
    """Judge the detections of one image with a score of at least `threshold`."""
    truth = image.truth
    taken, is_ignored = assign_detections(
        image.boxes_xyxy, image.scores, image.labels, truth, iou_threshold=iou_threshold
    )
    kept = image.scores.astype(np.float64) >= threshold
    order = np.argsort(-image.scores, kind="stable")
    order = order[kept[order]]
    # (kept, N), a crowd region has nothing to do with mistakes
    overlaps = np.where(
        truth.iscrowd, 0.0, coco_overlaps(image.boxes_xyxy[order], truth.boxes_xyxy, np.zeros_like(truth.iscrowd))
    )
    own = image.labels[order][:, None] == truth.labels
    fits, near = overlaps >= min(iou_threshold, 1 - 1e-10), overlaps >= NEARBY
    is_missed = ~truth.iscrowd
    is_missed[taken[order][taken[order] >= 0]] = False
    found_below = np.zeros(len(truth.labels), np.bool_)
    found_below[taken[~kept][taken[~kept] >= 0]] = True

    free = {"wrong_class": is_missed.copy(), "wrong_place": is_missed.copy()}
    detections = []
    for row, index in enumerate(order.tolist()):
        kind, candidates = _kind(int(taken[index]), bool(is_ignored[index]), own[row], fits[row], near[row])
        about = instead_of = -1
        if candidates.any():
            about = int(np.argmax(np.where(candidates, overlaps[row], -1.0)))
        if kind in free and (candidates & free[kind]).any():
            instead_of = int(np.argmax(np.where(candidates & free[kind], overlaps[row], -1.0)))
            free[kind][instead_of] = False
        detections.append(
            ClassifiedDetection(
                index=index,
                label=int(image.labels[index]),
                kind=kind,
                about=about,
                overlap=float(overlaps[row, about]) if about >= 0 else 0.0,
                instead_of=instead_of,
            )
        )
    kinds = np.array([one.kind for one in detections], dtype=object)
    reasons = {
        "wrong_class": (fits & ~own)[kinds == "wrong_class"].any(axis=0),
        "wrong_place": (near & own)[kinds == "wrong_place"].any(axis=0),
        "low_score": found_below,
    }
    missed = [
        Missed(index, int(truth.labels[index]), next((name for name in reasons if reasons[name][index]), "unseen"))
        for index in np.flatnonzero(is_missed).tolist()
    ]
    return ClassifiedImage(tuple(detections), tuple(missed), int((~truth.iscrowd).sum()))


def _kind(
    taken: int,
    is_ignored: bool,
    own: npt.NDArray[np.bool_],
    fits: npt.NDArray[np.bool_],
    near: npt.NDArray[np.bool_],
) -> tuple[str, npt.NDArray[np.bool_]]:
    """The kind of a detection and (N,) the true boxes it may be about."""
    if taken >= 0:
        return "right", np.arange(len(own)) == taken
    if is_ignored:
        return "ignored", np.zeros_like(own)
    for kind, candidates in (("duplicate", fits & own), ("wrong_class", fits & ~own), ("wrong_place", near & own)):
        if candidates.any():
            return kind, candidates
    return "background", np.zeros_like(own)


def f1_of(right: int, wrong: int, missed: int) -> float:
    """F1, 0-1; 1 where there is nothing to find and nothing was found."""
    everything = 2 * right + wrong + missed
    return 2 * right / everything if everything else 1.0


def f1_without(kind: str, counts: Mapping[str, int], put_right: Mapping[str, int], explained: int) -> float:
    """The F1 that there would be without the errors of one kind.

    Duplicates and background detections go. Detections of the wrong class or in the wrong place become right where a
    missed box is left for them, and else go. Of the missed boxes those are found that no detection of the wrong class
    or in the wrong place explains.

    Args:
        kind: one of `ERROR_KINDS`.
        counts: of "right" and of each error kind.
        put_right: of `wrong_class` and `wrong_place`, the detections with a missed box left for them.
        explained: missed boxes that a `wrong_class` or `wrong_place` detection explains.
    """
    right, wrong, missed = counts["right"], sum(counts[name] for name in FALSE_KINDS), counts["missed"]
    if kind == "missed":
        gained = missed - explained
        return f1_of(right + gained, wrong, missed - gained)
    gained = put_right.get(kind, 0)
    return f1_of(right + gained, wrong - counts[kind], missed - gained)
