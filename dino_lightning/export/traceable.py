"""The detector as a function of tensors alone, for `torch.export` and ONNX: no `Batch`, no sizes fixed on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.boxes import cxcywh_to_xyxy, paired_iou
from dino_lightning.model.dino import DINO, flatten_levels
from dino_lightning.model.token_geometry import TokenGeometry, token_geometry

Size = int | torch.SymInt
SUPPRESSION_ROUNDS = 16


class TraceableDetector(nn.Module):
    """The evaluation pass of a `DINO`, with its own weights; batch size, height and width may be symbols.

    Args:
        model: the detector; its parts are shared, not copied.
        max_detections: query-class pairs to keep, as in `postprocess`.
        nms_iou_threshold: non-maximum suppression as there; None for none.
    """

    def __init__(self, model: DINO, *, max_detections: int = 300, nms_iou_threshold: float | None = None) -> None:
        super().__init__()
        self.model, self.max_detections, self.nms_iou_threshold = model, max_detections, nms_iou_threshold

    def forward(
        self, images: Tensor, image_sizes: Tensor, original_sizes: Tensor, *, padded: bool = True
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The detections of a batch as tensors, and the tokens that became queries.

        Args:
            images: (B, 3, H, W) float32, normalised, each image top left in the canvas.
            image_sizes: (B, 2) int64, height and width of each image before padding.
            original_sizes: (B, 2) int64, height and width of the images that the boxes are wanted for.
            padded: whether some images may be smaller than the canvas; if none is, nothing is masked.

        Returns:
            boxes_xyxy (B, N, 4) float32 in pixels of the original images, scores (B, N) float32 and labels (B, N)
            int64, best first, and tokens (B, Q) int64, the encoder token of each query. N is `max_detections`, or
            queries times classes where that is less. What non-maximum suppression takes out has a score of 0.
        """
        model = self.model
        levels = model.neck(model.backbone(images))
        geometry = self._geometry(levels, images.shape[2], images.shape[3], image_sizes, padded)
        tokens, position = flatten_levels(levels, geometry, model.level_embedding)
        memory = model.encoder(tokens, position, geometry)
        selected = model.query_selection(memory, geometry)
        hidden, boxes = model.decoder(selected.content, selected.reference_logits, memory, geometry, last_only=True)
        _, class_head = model.decoder.heads(-1)
        scores = class_head(hidden[-1]).sigmoid()
        count = torch.sym_min(self.max_detections, scores.shape[1] * scores.shape[2])
        top_scores, top_indices = scores.flatten(1).topk(count, dim=1)
        labels = top_indices % model.num_classes
        queries = top_indices.div(model.num_classes, rounding_mode="floor")
        chosen = boxes[-1].gather(1, queries[..., None].expand(-1, -1, 4))
        scale = original_sizes.flip(-1).repeat(1, 2)[:, None].to(chosen.dtype)
        boxes_xyxy = cxcywh_to_xyxy(chosen) * scale
        if self.nms_iou_threshold is not None:
            kept = _non_maximum_suppression(boxes_xyxy, self.nms_iou_threshold)
            top_scores, order = (top_scores * kept).topk(count, dim=1)
            labels = labels.gather(1, order)
            boxes_xyxy = boxes_xyxy.gather(1, order[..., None].expand(-1, -1, 4))
        return boxes_xyxy, top_scores, labels, selected.token_indices

    def _geometry(
        self, levels: Sequence[Tensor], height: int, width: int, image_sizes: Tensor, padded: bool
    ) -> TokenGeometry:
        """As `DINO` does, from sizes in a tensor."""
        counts, ratios = [], []
        for level in levels:
            rows = ~_is_padding(image_sizes[:, 0], height, level.shape[2])
            columns = ~_is_padding(image_sizes[:, 1], width, level.shape[3])
            counts.append(torch.stack((rows.float().sum(1), columns.float().sum(1)), dim=-1))
            ratios.append(torch.stack((columns.float().mean(1), rows.float().mean(1)), dim=-1))
        return token_geometry(
            tuple((level.shape[2], level.shape[3]) for level in levels),
            torch.stack(counts, dim=1),
            torch.stack(ratios, dim=1),
            padded=padded,
            dim=self.model.level_embedding.shape[1],
            **self.model.position,
        )


class CanvasDetector(nn.Module):
    """From one image that fills a canvas of fixed size to its detections: everything but the image is constant.

    Args:
        detector: what detects.
        size: (height, width) of the canvas in pixels.
    """

    def __init__(self, detector: TraceableDetector, size: tuple[int, int]) -> None:
        super().__init__()
        self.detector = detector
        self.size: Tensor
        self.register_buffer("size", torch.tensor([size]), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(1, 3, H, W) uint8 RGB of the canvas's size -> as `TraceableDetector`, boxes in pixels of the canvas."""
        model = self.detector.model
        normalized = (images.float() - model.image_mean) / model.image_std
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.detector(normalized, self.size, self.size, padded=False)
        return found


class TraceablePreprocessing(nn.Module):
    """From images as they are to what `TraceableDetector` takes: resized by the rule of evaluation, and normalised.

    Args:
        model: the detector; only its pixel mean and standard deviation are used.
        image_size: short side in pixels that images are resized to.
        max_size: limit of the long side.
        stretch_to: side of the square that images are stretched to instead, or None.
    """

    def __init__(self, model: DINO, *, image_size: int, max_size: int, stretch_to: int | None = None) -> None:
        super().__init__()
        self.image_size, self.max_size, self.stretch_to = image_size, max_size, stretch_to
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", model.image_mean)
        self.register_buffer("std", model.image_std)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) uint8 RGB, images of one size -> the three arguments of `TraceableDetector`."""
        batch, _, height, width = images.shape
        new_height, new_width = self._resized(height, width)
        # Width first, rounded to bytes, then height: the order in which evaluation resizes uint8 images.
        pixels = images.float()
        for size in ((height, new_width), (new_height, new_width)):
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)  # type: ignore[arg-type]
            pixels = pixels.round().clamp(0, 255)
        normalized = (pixels - self.mean) / self.std
        return normalized, _sizes(images, batch, new_height, new_width), _sizes(images, batch, height, width)

    def _resized(self, height: Size, width: Size) -> tuple[Size, Size]:
        """`data.transforms.resized_size` in integers and without branches, which symbols do not have."""
        if self.stretch_to is not None:
            return self.stretch_to, self.stretch_to
        short, long = torch.sym_min(height, width), torch.sym_max(height, width)
        doubled = 2 * self.max_size * short + long
        limit = doubled // (2 * long)  # max_size * short / long, rounded, ties to even:
        limit = limit - (1 - torch.sym_min(1, doubled % (2 * long))) * (limit % 2)
        short_side = torch.sym_min(self.image_size, torch.sym_max(1, limit))
        return short_side * height // short, short_side * width // short


def _non_maximum_suppression(boxes_xyxy: Tensor, iou_threshold: float) -> Tensor:
    """(B, N, 4) boxes, best first -> (B, N) float32, 0 for those that overlap a better one, of those kept, too much.

    In operations that every runtime has. Each round settles the boxes whose better neighbours were settled by the round
    before, so the result is that of the greedy rule as long as no box hangs on a chain of more than so many others.
    """
    iou = paired_iou(boxes_xyxy[:, :, None], boxes_xyxy[:, None])
    rivals = (iou > iou_threshold).to(boxes_xyxy.dtype).tril(diagonal=-1)  # (B, N, N): row i, better ones of box i
    kept = torch.ones_like(boxes_xyxy[..., :1])
    for _ in range(SUPPRESSION_ROUNDS):
        kept = ((rivals @ kept) < 0.5).to(boxes_xyxy.dtype)
    return kept[..., 0]


def _sizes(images: Tensor, batch: int, height: Size, width: Size) -> Tensor:
    """(B, 2) int64, all rows the same."""
    columns = [torch.full((batch, 1), side, dtype=torch.int64, device=images.device) for side in (height, width)]
    return torch.cat(columns, dim=1)


def _is_padding(sizes: Tensor, length: int, cells: int) -> Tensor:
    """(B,) valid pixels out of `length` -> (B, cells) bool, what nearest interpolation makes of the pixels' mask."""
    pixel = (torch.arange(cells, device=sizes.device).float() * (length / cells)).floor()
    return pixel[None] >= sizes[:, None]
