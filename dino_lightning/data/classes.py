"""The classes of a dataset: which label stands for which category of the files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dino_lightning.data.coco import Category, CocoAnnotations
from dino_lightning.errors import DataError


@dataclass(frozen=True)
class Classes:
    """The classes of a training set: label k is `names[k]`, category `category_ids[k]` of the files.

    Attributes:
        category_ids: sorted ids of the training file.
        names: the name of each.
        left_out: a root category that is no class (see `classes_of`), or None.
    """

    category_ids: tuple[int, ...]
    names: tuple[str, ...]
    left_out: Category | None = None

    def __len__(self) -> int:
        return len(self.category_ids)

    def labels_of(self, annotations: CocoAnnotations) -> npt.NDArray[np.int64]:
        """(A,) int64 labels 0..K-1 of all rows of a file that `check_classes` has accepted.

        By the ids, or by the names where these agree and the ids do not (`by_name`).
        """
        if self.by_name(annotations):
            label_of_name = {_folded(name): label for label, name in enumerate(self.names)}
            labels = [label_of_name.get(_folded(category.name), -1) for category in annotations.categories]
        else:
            label_of_id = {category_id: label for label, category_id in enumerate(self.category_ids)}
            labels = [label_of_id.get(category.id, -1) for category in annotations.categories]
        return np.array(labels, dtype=np.int64)[annotations.category_indices]

    def by_name(self, annotations: CocoAnnotations) -> bool:
        """Whether a file numbers the same classes otherwise than the training file, so that names tell them.

        Programs that export each split by itself number classes by their first appearance. Upper and lower case make no
        other class.
        """
        used = annotations.used_category_ids()
        names = [_folded(category.name) for category in annotations.categories if category.id in used]
        ours = [_folded(name) for name in self.names]
        unlike = bool(_conflicts_by_id(annotations, self))
        clear = len(set(names)) == len(names) and len(set(ours)) == len(ours)
        return unlike and clear and set(names) <= set(ours)


def classes_of(training: CocoAnnotations) -> Classes:
    """The classes of a training file: all its categories by ascending id, used or not.

    One exception: Roboflow exports put all classes under a category 0 with supercategory "none", which no
    annotation uses. It is no class; keeping it would train a class that cannot occur.
    """
    first, others = training.categories[0], training.categories[1:]
    is_root = (
        first.id == 0
        and first.supercategory == "none"
        and bool(others)
        and all(category.supercategory == first.name for category in others)
        and first.id not in training.used_category_ids()
    )
    kept = others if is_root else training.categories
    return Classes(
        category_ids=tuple(category.id for category in kept),
        names=tuple(category.name for category in kept),
        left_out=first if is_root else None,
    )


def check_classes(annotations: CocoAnnotations, classes: Classes) -> None:
    """Make sure that a validation or test file means the same classes as the training file.

    Raises:
        DataError: a category that annotations use is unknown to training, or an id has another name there.
    """
    conflicts = class_conflicts(annotations, classes)
    if conflicts:
        more = f" (And {len(conflicts) - 1} more such categories.)" if len(conflicts) > 1 else ""
        raise DataError(conflicts[0] + more)


def class_conflicts(annotations: CocoAnnotations, classes: Classes) -> list[str]:
    """Where a validation or test file does not mean the same classes as the training file, a sentence each."""
    return [] if classes.by_name(annotations) else _conflicts_by_id(annotations, classes)


def _folded(name: str) -> str:
    return " ".join(name.split()).casefold()


def _conflicts_by_id(annotations: CocoAnnotations, classes: Classes) -> list[str]:
    name_of_id = dict(zip(classes.category_ids, classes.names, strict=True))
    used = annotations.used_category_ids()
    conflicts = []
    for category in annotations.categories:
        if category.id not in name_of_id:
            if category.id in used:
                conflicts.append(
                    f"{annotations.path}: category {category.id} ({category.name!r}) has annotations but is "
                    "no class of the training file. Use the same categories in both files."
                )
        elif category.name != name_of_id[category.id]:
            conflicts.append(
                f"{annotations.path}: category {category.id} is named {category.name!r} here but "
                f"{name_of_id[category.id]!r} in the training file. Use the same ids and names in both files."
            )
    return conflicts
