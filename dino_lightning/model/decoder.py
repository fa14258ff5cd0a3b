"""The decoder: anchor boxes refined layer by layer, looking forward twice (arXiv 2203.03605, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dino_lightning.boxes import inverse_sigmoid
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention
from dino_lightning.model.mlp import MLP, box_head
from dino_lightning.model.position_encoding import query_position_embedding
from dino_lightning.model.query_selection import class_head


class DecoderLayer(nn.Module):
    """Self-attention among queries, deformable cross-attention to the memory, feed-forward; all post-norm.

    The norms are numbered as in the published checkpoints: `norm2` follows self-attention, `norm1` cross-attention.
    """

    def __init__(
        self,
        *,
        hidden_dim: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.cross_attention = MultiScaleDeformableAttention(
            hidden_dim=hidden_dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.self_attention = nn.MultiheadAttention(hidden_dim, num_heads, dropout=dropout, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.linear1 = nn.Linear(hidden_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        padding_mask: Tensor,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """(B, Q, D) queries, their positions and (B, Q, L, 4) reference boxes -> (B, Q, D)."""
        positioned = queries + position
        attended, _ = self.self_attention(positioned, positioned, queries, attn_mask=attention_mask, need_weights=False)
        queries = self.norm2(queries + self.dropout(attended))
        attended = self.cross_attention(queries + position, reference_points, memory, spatial_shapes, padding_mask)
        queries = self.norm1(queries + self.dropout(attended))
        hidden = self.linear2(self.dropout(self.linear1(queries).relu_()))
        out: Tensor = self.norm3(queries + self.dropout(hidden))
        return out


class Decoder(nn.Module):
    """Decoder layers with one box head and one class head shared by all of them, or with heads for each.

    Args:
        num_layers: N, number of layers.
        hidden_dim: D.
        num_classes: K.
        num_levels: feature levels.
        num_heads: attention heads.
        num_points: sampling points for each head and level.
        ffn_dim: inner width of the feed-forward networks.
        dropout: in the layers.
        shared_heads: one box head and one class head for all layers; else `bbox_head` and `class_head` are lists.
        box_epsilon: the reported boxes are measured from references clamped so far from 0 and 1.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_dim: int,
        num_classes: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
        shared_heads: bool = True,
        box_epsilon: float = 1e-3,
    ) -> None:
        super().__init__()
        self.shared_heads, self.box_epsilon = shared_heads, box_epsilon
        self.layers = nn.ModuleList(
            DecoderLayer(
                hidden_dim=hidden_dim,
                num_levels=num_levels,
                num_heads=num_heads,
                num_points=num_points,
                ffn_dim=ffn_dim,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.query_position_head = MLP(
            input_dim=2 * hidden_dim, hidden_dim=hidden_dim, output_dim=hidden_dim, num_layers=2
        )
        self.bbox_head: nn.Module
        self.class_head: nn.Module
        if shared_heads:
            self.bbox_head, self.class_head = box_head(hidden_dim), class_head(hidden_dim, num_classes)
        else:
            self.bbox_head = nn.ModuleList(box_head(hidden_dim) for _ in range(num_layers))
            self.class_head = nn.ModuleList(class_head(hidden_dim, num_classes) for _ in range(num_layers))
        self._dim_per_coordinate = hidden_dim // 2

    def heads(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The box head and the class head of a layer; -1 is the last one."""
        if self.shared_heads:
            return self.bbox_head, self.class_head
        assert isinstance(self.bbox_head, nn.ModuleList) and isinstance(self.class_head, nn.ModuleList)
        return self.bbox_head[layer], self.class_head[layer]

    def class_logits(self, hidden: Tensor) -> Tensor:
        """(N, B, Q, D), the normed output of each layer -> (N, B, Q, K)."""
        if self.shared_heads:
            logits: Tensor = self.class_head(hidden)
            return logits
        return torch.stack([self.heads(layer)[1](values) for layer, values in enumerate(hidden)])

    def forward(
        self,
        queries: Tensor,
        reference_logits: Tensor,
        memory: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        valid_ratios: Tensor,
        padding_mask: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Refine boxes and content of the queries through all layers.

        Args:
            queries: (B, Q, D) content.
            reference_logits: (B, Q, 4) box logits of the anchors.
            memory: (B, S, D) encoder output.
            spatial_shapes: (height, width) of each level.
            valid_ratios: (B, L, 2) float32.
            padding_mask: (B, S) bool, True = padding.
            attention_mask: (Q, Q) bool, True = may not attend; or None.

        Returns:
            hidden (N, B, Q, D), the normed output of each of the N layers, and boxes_cxcywh (N, B, Q, 4) float32.
        """
        scale = valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        reference = reference_logits.float().sigmoid()  # what this layer's box is measured from
        anchor = reference.detach()  # what this layer attends with
        hidden, boxes = [], []
        for index, layer in enumerate(self.layers):
            scaled = anchor[:, :, None] * scale
            sine = query_position_embedding(scaled[:, :, 0], self._dim_per_coordinate)
            position = self.query_position_head(sine)
            queries = layer(queries, position, scaled, memory, spatial_shapes, padding_mask, attention_mask)
            normed = self.norm(queries)
            hidden.append(normed)
            bbox_head, _ = self.heads(index)
            with torch.autocast(device_type=memory.device.type, enabled=False):
                offset = bbox_head(normed.float())
                boxes.append((offset + inverse_sigmoid(reference, self.box_epsilon)).sigmoid())
                if index + 1 < len(self.layers):
                    # Look forward twice: the refined box starts from the detached anchor, but the next layer's loss
                    # still reaches this layer's offset, because `reference` itself is not detached.
                    reference = (bbox_head(queries.float()) + inverse_sigmoid(anchor)).sigmoid()
                    anchor = reference.detach()
        return torch.stack(hidden), torch.stack(boxes)
