"""Classes of a dataset chosen and merged before anything else sees them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dino_lightning.data.coco import Category, CocoAnnotations
from dino_lightning.errors import DataError


@dataclass(frozen=True)
class ClassChoice:
    """Which classes of a dataset are trained on; see the arguments of `CocoDataModule`.

    Attributes:
        classes: the names of those that stay, after merging; None for all.
        merged: which names become one class, by its name.
    """

    classes: tuple[str, ...] | None = None
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse a choice that contradicts itself.

        Raises:
            ValueError: says what does.
        """
        parts = [name for names in self.merged.values() for name in names]
        twice = sorted({name for name in parts if parts.count(name) > 1})
        if twice:
            raise ValueError(f"merge_classes puts {twice[0]!r} into two classes.")
        chained = [name for name in self.merged if name in parts and name not in self.merged[name]]
        if chained:
            raise ValueError(f"merge_classes: {chained[0]!r} is a new class and a part of another one.")
        if self.classes is not None and not self.classes:
            raise ValueError("classes is an empty list; name at least one class.")
        if self.classes is not None and len(set(self.classes)) < len(self.classes):
            raise ValueError("classes names a class twice.")
        hidden = [name for name in self.classes or () if name in parts and name not in self.merged]
        if hidden:
            raise ValueError(f"classes names {hidden[0]!r}, which merge_classes puts into another class.")


EVERY_CLASS = ClassChoice()


def class_choice(classes: Sequence[str] | None, merged: Mapping[str, Sequence[str]] | None) -> ClassChoice:
    """The choice of the options `classes` and `merge_classes`.

    Raises:
        ValueError: they contradict each other.
    """
    choice = ClassChoice(
        None if classes is None else tuple(classes), {new: tuple(parts) for new, parts in (merged or {}).items()}
    )
    choice.check()
    return choice


def choose_classes(
    annotations: CocoAnnotations, choice: ClassChoice, *, all_needed: bool
) -> tuple[CocoAnnotations, str]:
    """A file with some of its classes, and some of them merged.

    Annotations of classes that do not stay are dropped: where they lie is background. All images stay. The id of a
    merged class is that of the category with its name, else the smallest of its parts.

    Args:
        annotations: the file.
        choice: what stays.
        all_needed: whether every class named has to be in the file, as in the training file.

    Returns:
        The file, and a sentence about what was dropped and merged; empty where nothing was.

    Raises:
        DataError: a name is that of no category; says which there are.
    """
    names = [category.name for category in annotations.categories]
    if all_needed:
        _check_names(annotations, choice, names)
    target = {part: new for new, parts in choice.merged.items() for part in parts}
    merged: dict[str, Category] = {}  # what each new class is
    for category in annotations.categories:  # by ascending id
        new = target.get(category.name, category.name)
        if new in choice.merged and (new not in merged or (category.name == new != merged[new].name)):
            merged[new] = category
    merged = {new: replace(category, name=new) for new, category in merged.items()}
    new_of = [merged.get(target.get(c.name, c.name), c) for c in annotations.categories]
    stays = [choice.classes is None or category.name in choice.classes for category in new_of]
    kept = sorted(
        {category for category, stay in zip(new_of, stays, strict=True) if stay}, key=lambda category: category.id
    )
    position = {category: index for index, category in enumerate(kept)}
    table = np.array([position.get(category, -1) for category in new_of], dtype=np.int64)
    indices = table[annotations.category_indices]
    chosen = annotations.keep_rows(indices >= 0)
    joined = sum(name in target for name in names)
    dropped = len(indices) - int((indices >= 0).sum())
    parts = []
    if joined:
        parts.append(f"{joined} categories merged into {', '.join(choice.merged)}")
    if choice.classes is not None:
        parts.append(f"{dropped} annotations of {len(names) - sum(stays)} other categories left out, as background")
    sentence = f"{annotations.path}: {'; '.join(parts)}." if parts else ""
    return replace(chosen, categories=tuple(kept), category_indices=indices[indices >= 0]), sentence


def _check_names(annotations: CocoAnnotations, choice: ClassChoice, names: Sequence[str]) -> None:
    parts = [part for all_parts in choice.merged.values() for part in all_parts]
    after = sorted({*names, *choice.merged} - (set(parts) - set(choice.merged)))
    for name, option, there in [
        *((part, "--data.merge_classes", names) for part in parts),
        *((name, "--data.classes", after) for name in choice.classes or ()),
    ]:
        if name in there:
            continue
        close = difflib.get_close_matches(name, there, n=1) or [n for n in there if n.lower() == name.lower()]
        hint = f" Did you mean {close[0]!r}?" if close else f" It has {', '.join(sorted(there)[:20])}."
        raise DataError(f"{annotations.path}: has no category {name!r}, which {option} names.{hint}")
