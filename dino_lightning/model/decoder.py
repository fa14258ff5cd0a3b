"""The decoder: anchor boxes refined layer by layer, looking forward twice (arXiv 2203.03605, section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.boxes import inverse_sigmoid
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention
from dino_lightning.model.deformable_attention.module import without_padding
from dino_lightning.model.feed_forward import feed_forward
from dino_lightning.model.linear import linear
from dino_lightning.model.lower_precision import as_made, is_watched, lower_precision, lowered
from dino_lightning.model.mlp import MLP, box_head
from dino_lightning.model.position_encoding import query_position_embedding, sine_divisors
from dino_lightning.model.query_selection import class_head
from dino_lightning.model.residual_norm import residual_norm
from dino_lightning.model.token_geometry import TokenGeometry


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
        values: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        attention_bias: Tensor | None,
    ) -> Tensor:
        """(B, Q, D) queries and positions, (B, Q, L, 4) reference boxes, (B, S, D) projected memory -> (B, Q, D)."""
        attended = self._attend_to_queries(queries + position, queries, attention_bias)
        normed = residual_norm(queries, self.dropout(attended), self.norm2, position=position)
        attended = self.cross_attention.attend(normed.at(position), reference_points, values, spatial_shapes)
        normed = residual_norm(normed.exact, self.dropout(attended), self.norm1)
        hidden = feed_forward(normed.for_products(), self.linear1, self.linear2, self.dropout)
        return residual_norm(normed.exact, self.dropout(hidden), self.norm3, copies=False).exact

    def _attend_to_queries(self, positioned: Tensor, queries: Tensor, bias: Tensor | None) -> Tensor:
        """What `self.self_attention` does, with queries and keys by one product, and a mask that is ready for use."""
        attention, (batch, count, dim) = self.self_attention, queries.shape
        if type(attention) is not nn.MultiheadAttention or is_watched(attention) or not as_made(attention.out_proj):
            out: Tensor = attention(positioned, positioned, queries, attn_mask=bias, need_weights=False)[0]
            return out
        weight, shift, *to_output = lowered(
            attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias
        )
        (weight_qk, weight_v), (shift_qk, shift_v) = (torch.split(x, [2 * dim, dim]) for x in (weight, shift))

        def by_head(x: Tensor) -> Tensor:
            return x.view(batch, count, attention.num_heads, -1).transpose(1, 2)

        query, key = linear(positioned, weight_qk, shift_qk).chunk(2, dim=-1)
        attended = F.scaled_dot_product_attention(
            by_head(query),
            by_head(key),
            by_head(linear(queries, weight_v, shift_v)),
            attn_mask=bias,
            dropout_p=attention.dropout if self.training else 0.0,
        )
        return linear(attended.transpose(1, 2).reshape(batch, count, dim), *to_output)


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
        return _by_layer(self.class_head, hidden)

    def forward(
        self,
        queries: Tensor,
        reference_logits: Tensor,
        memory: Tensor,
        geometry: TokenGeometry,
        attention_mask: Tensor | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Refine boxes and content of the queries through all layers.

        Args:
            queries: (B, Q, D) content.
            reference_logits: (B, Q, 4) box logits of the anchors.
            memory: (B, S, D) encoder output.
            geometry: where the tokens of the memory lie.
            attention_mask: (Q, Q) bool, True = may not attend; or None.
            last_only: leave out what all layers but the last report, so that N is 1.

        Returns:
            hidden (N, B, Q, D), the normed output of each of the N layers, and boxes_cxcywh (N, B, Q, 4) float32.
        """
        scale = geometry.valid_ratios.repeat(1, 1, 2)[:, None]  # (B, 1, L, 4)
        divisors = sine_divisors(self._dim_per_coordinate, device=memory.device)
        bias = None if attention_mask is None else _additive(attention_mask, memory)
        reference = reference_logits.float().sigmoid()  # what this layer's box is measured from
        anchor = reference.detach()  # what this layer attends with
        values = self.values(memory, geometry.padding_mask)
        contents, references = [], []
        for index, (layer, of_layer) in enumerate(zip(self.layers, values, strict=True)):
            scaled = anchor[:, :, None] * scale
            position = self.query_position_head(query_position_embedding(scaled[:, :, 0], divisors))
            queries = layer(queries, position, scaled, of_layer, geometry.spatial_shapes, bias)
            contents.append(queries)
            references.append(reference)
            if index + 1 < len(self.layers):
                bbox_head, _ = self.heads(index)
                with torch.autocast(device_type=memory.device.type, enabled=False):
                    # Look forward twice: the refined box starts from the detached anchor, but the next layer's loss
                    # still reaches this layer's offset, because `reference` itself is not detached.
                    reference = (bbox_head(queries.float()) + inverse_sigmoid(anchor)).sigmoid()
                    anchor = reference.detach()
        if last_only:
            contents, references = contents[-1:], references[-1:]
        hidden = self.norm(torch.stack(contents))  # of all layers at once: fewer operations
        with torch.autocast(device_type=memory.device.type, enabled=False):
            bbox_head = self.heads(-1)[0] if last_only else self.bbox_head
            offsets = _by_layer(bbox_head, hidden.float())
            boxes = (offsets + inverse_sigmoid(torch.stack(references), self.box_epsilon)).sigmoid()
        return hidden, boxes

    def values(self, memory: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, ...]:
        """(B, S, D) for each layer: what its cross-attention samples from, all by one product."""
        projections = [layer.get_submodule("cross_attention.value_proj") for layer in self.layers]
        if not as_made(*projections):
            return tuple(without_padding(project(memory), padding_mask) for project in projections)
        weights = lowered(*(weight for projection in projections for weight in projection.parameters()))
        values = linear(memory, torch.cat(weights[::2]), torch.cat(weights[1::2]))
        return without_padding(values, padding_mask).chunk(len(projections), dim=-1)


def _by_layer(head: nn.Module, hidden: Tensor) -> Tensor:
    """(N, B, Q, D) -> (N, B, Q, X), by one head that all layers share, or by a list with a head for each of them."""
    if isinstance(head, nn.ModuleList):
        return torch.stack([one(values) for one, values in zip(head, hidden, strict=True)])
    out: Tensor = head(hidden)
    return out


def _additive(blocked: Tensor, like: Tensor) -> Tensor:
    """(Q, Q) bool, True = may not attend -> the same as numbers to add, for all layers.

    In memory rows are a multiple of 16 long: attention kernels want them aligned, and would copy them in every layer.
    """
    rows, columns = blocked.shape
    dtype = lower_precision(like.device.type) or like.dtype
    bias = torch.zeros(rows, columns + -columns % 16, dtype=dtype, device=like.device)
    return bias[:, :columns].masked_fill_(blocked, -torch.inf)
