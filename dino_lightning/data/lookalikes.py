"""Images that are the same, or nearly, within a dataset and across its splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.spatial import cKDTree

from dino_lightning.data.image_facts import ImageFacts

BLOCKS = 8  # a thumbnail's 8 x 8 block means find candidates, its pixels decide
BLOCK_DISTANCE = 1.5  # grey levels, in every block
PIXEL_DISTANCE = 2.0  # grey levels, on average over the thumbnail
ASPECT_DISTANCE = 0.02
LEAST_CONTRAST = 3.0  # grey levels; blank pages resemble each other without being copies
MOST_CANDIDATES = 200_000


def same_images(facts: Sequence[ImageFacts]) -> list[list[int]]:
    """Groups of indices of files with the same content, each of two or more."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, fact in enumerate(facts):
        if fact.digest:
            groups[fact.digest].append(index)
    return [group for group in groups.values() if len(group) > 1]


def similar_images(facts: Sequence[ImageFacts]) -> list[tuple[int, int]]:
    """Pairs of indices of files that differ in content but hardly in what they show, at whatever size.

    Strict on purpose: drawings on white paper are alike everywhere but in their lines.
    """
    seen: set[bytes] = set()
    indices = []
    for index, fact in enumerate(facts):
        if not fact.error and fact.digest not in seen and fact.thumbnail.std() >= LEAST_CONTRAST:
            seen.add(fact.digest)
            indices.append(index)
    if len(indices) < 2:
        return []
    thumbnails = np.stack([facts[index].thumbnail for index in indices]).astype(np.float32)
    side = thumbnails.shape[1] // BLOCKS
    blocks = thumbnails.reshape(len(indices), BLOCKS, side, BLOCKS, side).mean((2, 4)).reshape(len(indices), -1)
    tree = cKDTree(blocks)
    pairs: list[tuple[int, int]] = []
    candidates = 0
    for first, others in enumerate(tree.query_ball_point(blocks, BLOCK_DISTANCE, p=np.inf)):
        for second in others:
            if second <= first:
                continue
            candidates += 1
            if candidates > MOST_CANDIDATES:
                return pairs
            one, other = facts[indices[first]], facts[indices[second]]
            aspects = one.size[1] / one.size[0], other.size[1] / other.size[0]
            if abs(aspects[0] / aspects[1] - 1) > ASPECT_DISTANCE:
                continue
            if np.abs(thumbnails[first] - thumbnails[second]).mean() <= PIXEL_DISTANCE:
                pairs.append((indices[first], indices[second]))
    return pairs
