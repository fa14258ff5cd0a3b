"""Mixed query selection: proposals give the anchors, learned rows the content (arXiv 2203.03605, section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_lightning.model.mlp import box_head
from dino_lightning.model.token_geometry import TokenGeometry

PRIOR_PROBABILITY = 0.01  # class scores start here, as in RetinaNet (arXiv 1708.02002)


def class_head(hidden_dim: int, num_classes: int) -> nn.Linear:
    """A class layer whose scores all start at `PRIOR_PROBABILITY`: (..., D) -> (..., K) logits."""
    head = nn.Linear(hidden_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return head


@dataclass(frozen=True)
class SelectedQueries:
    """The proposals taken from the encoder, best first.

    Attributes:
        content: (B, Q, D) learned content, row i for the proposal of rank i.
        reference_logits: (B, Q, 4) float32, box logits of the proposals, detached.
        logits: (B, Q, K) class logits of the proposals.
        boxes_cxcywh: (B, Q, 4) float32 boxes of the proposals, not detached.
        token_indices: (B, Q) int64, the token each one came from.
    """

    content: Tensor
    reference_logits: Tensor
    logits: Tensor
    boxes_cxcywh: Tensor
    token_indices: Tensor


class QuerySelection(nn.Module):
    """Scores every encoder token as a proposal and keeps the best `num_queries`."""

    def __init__(self, *, hidden_dim: int, num_classes: int, num_queries: int) -> None:
        super().__init__()
        self.content_queries = nn.Embedding(num_queries, hidden_dim)
        self.output_projection = nn.Linear(hidden_dim, hidden_dim)
        self.output_norm = nn.LayerNorm(hidden_dim)
        self.bbox_head = box_head(hidden_dim)
        self.class_head = class_head(hidden_dim, num_classes)

    def forward(
        self,
        memory: Tensor,
        geometry: TokenGeometry,
        token_indices: Tensor | None = None,
    ) -> SelectedQueries:
        """Score all tokens and take the best as proposals.

        Args:
            memory: (B, S, D) encoder output.
            geometry: where the tokens lie.
            token_indices: (B, Q) int64, the tokens to take instead of the best, to repeat the selection of another run.

        Returns:
            At most `num_queries` proposals: fewer where the image has fewer tokens.
        """
        # A token whose cell lies in the padding, or whose box would leave the image, must not become a proposal.
        proposal_logits, usable = encoder_proposals(geometry)
        tokens = self.output_norm(self.output_projection(memory.masked_fill(~usable[..., None], 0.0)))
        count = torch.sym_min(self.content_queries.num_embeddings, tokens.shape[1])  # torch.export traces this one
        with torch.autocast(device_type=memory.device.type, enabled=False):
            tokens = tokens.float()  # ranks and boxes need more than bfloat16's eight bits
            logits = self.class_head(tokens)
            # By the best class of a token, as in two-stage Deformable DETR: which class it is does not matter here.
            indices = logits.amax(-1).topk(count, dim=1).indices if token_indices is None else token_indices

        def selected(values: Tensor) -> Tensor:
            return values.expand(indices.shape[0], -1, -1).gather(
                1, indices[..., None].expand(-1, -1, values.shape[-1])
            )

        with torch.autocast(device_type=memory.device.type, enabled=False):
            box_logits = self.bbox_head(selected(tokens)) + selected(proposal_logits)
        # Mixed selection: the place comes from the image, the content is learned. Content taken from the proposals as
        # well would be ambiguous, since a proposal may cover several objects or a part of one (section 3.3).
        return SelectedQueries(
            content=self.content_queries.weight[:count].expand(memory.shape[0], -1, -1),
            reference_logits=box_logits.detach(),  # the decoder refines proposals; it does not train their head
            logits=selected(logits),
            boxes_cxcywh=box_logits.sigmoid(),
            token_indices=indices,
        )


def encoder_proposals(geometry: TokenGeometry) -> tuple[Tensor, Tensor]:
    """A square box of side 0.05 * 2^level round every cell's centre (two-stage Deformable DETR, arXiv 2010.04159 A.4).

    Args:
        geometry: where the tokens lie.

    Returns:
        (B, S, 4) float32 box logits, infinite where unusable, and (B, S) bool, True for usable tokens: not
        padding, and all four numbers strictly inside 0.01-0.99. B is 1 where all images share one geometry.
    """
    centres = geometry.centres
    sides = [
        centres.new_full((height * width,), 0.05 * 2.0**level)
        for level, (height, width) in enumerate(geometry.spatial_shapes)
    ]
    boxes = torch.cat((centres, torch.cat(sides)[None, :, None].expand(centres.shape[0], -1, 2)), dim=-1)
    usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)
    if geometry.padding_mask is not None:
        usable = usable & ~geometry.padding_mask
    logits = torch.log(boxes / (1 - boxes)).masked_fill(~usable[..., None], torch.inf)
    return logits, usable
