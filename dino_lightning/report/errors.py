"""The kind of error of each detection, and why a ground-truth box was missed.

The kinds are those of TIDE (arXiv 2008.08115, section 2.2), counted at one score threshold. A detection is *kept* if
its score reaches the threshold. The kept detections are matched to the ground-truth boxes as for F1
(`dino_lightning.metrics.curves`). With IoUs to ground-truth boxes that are no crowd regions, a detection is of the
first kind that fits:

- `correct`: a true positive, matched to a ground-truth box of its class with IoU >= `iou_threshold` (0.5).
- `ignored`: it matches only a crowd region of its class, and counts neither way.
- `duplicate`: IoU >= `iou_threshold` with a box of its class that another detection is matched to.
- `classification`: IoU >= `iou_threshold` with a box of another class.
- `localization`: `NEARBY` (0.1) <= IoU < `iou_threshold` with a box of its class.
- `both`: `NEARBY` <= IoU < `iou_threshold` with a box of another class: class and location are wrong.
- `background`: IoU < `NEARBY` with every box.

A ground-truth box that no kept detection is matched to is `missed`. So correct + missed are all ground-truth boxes, and
correct + the five kinds of false positives are all detections that count. The reason for a missed box is the first of
these that fits:

- `classification`: a detection with a classification error covers it.
- `localization`: a detection with a localization error is near it.
- `low_score`: a detection below the threshold matches it.
- `unseen`: none of these. As in TIDE a `both` detection explains no missed box: which box it was meant for is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dino_lightning.metrics import EvaluatedImage, assign_detections, coco_overlaps

NEARBY = 0.1  # IoU
FALSE_KINDS = ("duplicate", "classification", "localization", "both", "background")  # of detections: false positives
ERROR_KINDS = ("missed", *FALSE_KINDS)
SEVERAL_CLASSES_KINDS = ("classification", "both")  # impossible where there is one class
CORRECTABLE_KINDS = ("classification", "localization")  # a detection becomes correct once the error is corrected
REASONS = (*CORRECTABLE_KINDS, "low_score", "unseen")


@dataclass(frozen=True)
class ClassifiedDetection:
    """A kept detection.

    Attributes:
        index: its index in `EvaluatedImage`.
        label: its class.
        kind: "correct", "ignored" or one of `FALSE_KINDS`.
        about: index of the ground-truth box that it is matched to, repeats, confuses or is near; -1 for none.
        overlap: IoU with that box, 0 for none.
        instead_of: for `CORRECTABLE_KINDS`, index of the missed ground-truth box that it would be matched to if its
            error were corrected (each box once, the best score first); -1 if there is none left.
    """

    index: int
    label: int
    kind: str
    about: int
    overlap: float
    instead_of: int


@dataclass(frozen=True)
class Missed:
    """A ground-truth box that was not found: its index, its class and one of `REASONS`."""

    index: int
    label: int
    reason: str


@dataclass(frozen=True)
class ClassifiedImage:
    """The detections and the ground-truth boxes of one image.

    Attributes:
        detections: those kept, best first.
        missed: the ground-truth boxes not found.
        num_boxes: ground-truth boxes without crowd regions.
    """

    detections: tuple[ClassifiedDetection, ...]
    missed: tuple[Missed, ...]
    num_boxes: int

    def count(self, kind: str) -> int:
        """Number of detections, or of missed boxes, of a kind."""
        return len(self.missed) if kind == "missed" else sum(one.kind == kind for one in self.detections)

    @property
    def num_counted(self) -> int:
        """Number of detections outside crowd regions."""
        return len(self.detections) - self.count("ignored")

    @property
    def f1(self) -> float:
        """F1 of the image, 0-1; 1 where there is nothing to find and nothing was found."""
        return f1_of(self.count("correct"), self.num_counted - self.count("correct"), len(self.missed))


def classify_image(image: EvaluatedImage, *, threshold: float, iou_threshold: float = 0.5) -> ClassifiedImage:
    """Classify the detections of one image with a score of at least `threshold`, and the boxes they miss."""
    truth = image.truth
    taken, is_ignored = assign_detections(
        image.boxes_xyxy, image.scores, image.labels, truth, iou_threshold=iou_threshold
    )
    kept = image.scores.astype(np.float64) >= threshold
    order = np.argsort(-image.scores, kind="stable")
    order = order[kept[order]]
    # (kept, N); crowd regions overlap nothing here, so that no error refers to one
    overlaps = np.where(
        truth.iscrowd, 0.0, coco_overlaps(image.boxes_xyxy[order], truth.boxes_xyxy, np.zeros_like(truth.iscrowd))
    )
    own = image.labels[order][:, None] == truth.labels
    fits, near = overlaps >= min(iou_threshold, 1 - 1e-10), overlaps >= NEARBY
    is_missed = ~truth.iscrowd
    is_missed[taken[order][taken[order] >= 0]] = False
    found_below = np.zeros(len(truth.labels), np.bool_)
    found_below[taken[~kept][taken[~kept] >= 0]] = True

    free = {kind: is_missed.copy() for kind in CORRECTABLE_KINDS}
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
        "classification": (fits & ~own)[kinds == "classification"].any(axis=0),
        "localization": (near & own)[kinds == "localization"].any(axis=0),
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
    """The kind of a detection, and (N,) which ground-truth boxes it may be about."""
    if taken >= 0:
        return "correct", np.arange(len(own)) == taken
    if is_ignored:
        return "ignored", np.zeros_like(own)
    for kind, candidates in (
        ("duplicate", fits & own),
        ("classification", fits & ~own),
        ("localization", near & own),
        ("both", near & ~own),
    ):
        if candidates.any():
            return kind, candidates
    return "background", np.zeros_like(own)


def f1_of(correct: int, wrong: int, missed: int) -> float:
    """F1, 0-1, of true positives, false positives and missed boxes; 1 where all three are 0."""
    everything = 2 * correct + wrong + missed
    return 2 * correct / everything if everything else 1.0


def f1_without(kind: str, counts: Mapping[str, int], correctable: Mapping[str, int], explained: int) -> float:
    """The F1 that there would be without the errors of one kind.

    As TIDE's oracles do: `duplicate`, `both` and `background` detections are removed; `classification` and
    `localization` detections become correct where a missed box is left for them, and are removed otherwise; missed
    boxes are found, except for those that a `classification` or `localization` detection explains.

    Args:
        kind: one of `ERROR_KINDS`.
        counts: number of "correct" detections and of each error kind.
        correctable: number of detections of each of `CORRECTABLE_KINDS` with a missed box left for them.
        explained: number of missed boxes that such a detection explains.
    """
    correct, wrong, missed = counts["correct"], sum(counts[name] for name in FALSE_KINDS), counts["missed"]
    if kind == "missed":
        gained = missed - explained
        return f1_of(correct + gained, wrong, missed - gained)
    gained = correctable.get(kind, 0)
    return f1_of(correct + gained, wrong - counts[kind], missed - gained)
