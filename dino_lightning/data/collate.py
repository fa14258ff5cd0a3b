"""From samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence

from dino_lightning.data.coco import DataError
from dino_lightning.data.dataset import Sample
from dino_lightning.structures import Batch


def collate(
    samples: Sequence[Sample | None], *, pad_to: tuple[int, int] | None = None, pad_to_multiple: int = 1
) -> Batch:
    """Put samples into one batch; unreadable images (None) are left out, which makes the batch smaller.

    Args:
        samples: what `CocoDetection` gave.
        pad_to: canvas (height, width) in pixels; defaults to the largest height and width of the samples.
        pad_to_multiple: round the canvas up to a multiple of this.

    Raises:
        DataError: not one image of the batch could be read.
        ValueError: a sample is larger than `pad_to`.
    """
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        raise DataError(
            f"None of the {len(samples)} images of a batch could be read. "
            "Set on_bad_image=error to see which and why."
        )
    truths = [sample.ground_truth for sample in readable if sample.ground_truth is not None]
    return Batch.from_images(
        [sample.image for sample in readable],
        image_ids=[sample.image_id for sample in readable],
        original_sizes=[sample.original_size for sample in readable],
        targets=[(sample.boxes_cxcywh, sample.labels) for sample in readable],
        ground_truth=truths if len(truths) == len(readable) else None,
        pad_to=pad_to,
        pad_to_multiple=pad_to_multiple,
    )
