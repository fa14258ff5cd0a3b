"""Duplicate and near-duplicate images within a dataset and across its splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree

from dino_lightning.inspection.image_facts import ImageFacts

BLOCKS = 8  # the means of 8 x 8 blocks of a thumbnail find candidates, its pixels decide
BLOCK_DISTANCE = 1.5  # grey levels, in every block
PIXEL_DISTANCE = 2.0  # grey levels, on average over the thumbnail
ASPECT_DISTANCE = 0.02
LEAST_CONTRAST = 3.0  # grey levels; blank pages look alike without being duplicates
MOST_COMPARED = 2_000_000  # pairs, about half a minute


def same_images(facts: Sequence[ImageFacts]) -> list[list[int]]:
    """Groups of two or more indices of files with the same content."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        if fact.digest:
            groups[fact.digest].append(index)
    return [group for group in groups.values() if len(group) > 1]


def similar_images(facts: Sequence[ImageFacts]) -> tuple[list[tuple[int, int]], bool]:
    """Pairs of indices of files that differ in content but show nearly the same, at any size.

    The limits are strict on purpose: drawings on white paper differ in their lines only.

    Returns:
        Pairs of an image and a later near-duplicate, each later image once; and whether all images were compared.
    """
    seen: set[bytes] = set()
    indices = []
    for index, fact in enumerate(facts):
        if not fact.error and fact.digest not in seen and fact.thumbnail.std() >= LEAST_CONTRAST:
            seen.add(fact.digest)
            indices.append(index)
    if len(indices) < 2:
        return [], True
    blocks = np.stack([_block_means(facts[index].thumbnail) for index in indices])
    tree = cKDTree(blocks)
    pairs: list[tuple[int, int]] = []
    matched: set[int] = set()
    compared = 0
    for first in range(len(indices)):  # one by one: all lists at once may need quadratic memory
        if first in matched:
            continue
        near = tree.query_ball_point(blocks[first], BLOCK_DISTANCE, p=np.inf)
        others = [other for other in sorted(near) if other > first and other not in matched]
        compared += len(others)
        if compared > MOST_COMPARED:
            return pairs, False
        for other in others:
            if _alike(facts[indices[first]], facts[indices[other]]):
                matched.add(other)
                pairs.append((indices[first], indices[other]))
    return pairs, True


def _alike(one: ImageFacts, other: ImageFacts) -> bool:
    """Whether the aspect ratios and the thumbnails of two images agree."""
    aspects = one.size[1] / one.size[0], other.size[1] / other.size[0]
    if abs(aspects[0] / aspects[1] - 1) > ASPECT_DISTANCE:
        return False
    return bool(np.abs(one.thumbnail.astype(np.float32) - other.thumbnail).mean() <= PIXEL_DISTANCE)


def _block_means(thumbnail: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(64,) mean grey level of each of the 8 x 8 blocks."""
    side = thumbnail.shape[0] // BLOCKS
    blocks: npt.NDArray[np.float32] = thumbnail.reshape(BLOCKS, side, BLOCKS, side).mean((1, 3), dtype=np.float32)
    return blocks.ravel()
