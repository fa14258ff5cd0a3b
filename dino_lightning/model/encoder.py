"""The deformable encoder: every cell of every level attends to a few points of all levels (arXiv 2010.04159)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, both post-norm."""

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
        self.self_attention = MultiScaleDeformableAttention(
            hidden_dim=hidden_dim, num_levels=num_levels, num_heads=num_heads, num_points=num_points
        )
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.linear1 = nn.Linear(hidden_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        reference_points: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        padding_mask: Tensor,
    ) -> Tensor:
        """(B, S, D) tokens and their positions -> (B, S, D)."""
        attended = self.self_attention(tokens + position, reference_points, tokens, spatial_shapes, padding_mask)
        tokens = self.norm1(tokens + self.dropout(attended))
        hidden = self.linear2(self.dropout(self.linear1(tokens).relu_()))
        out: Tensor = self.norm2(tokens + self.dropout(hidden))
        return out


class Encoder(nn.Module):
    """A stack of encoder layers; no final norm.

    With `recompute`, training keeps only what goes into each layer and computes the rest again on the way back: less
    memory, for about a third more time in the encoder.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_dim: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            EncoderLayer(
                hidden_dim=hidden_dim,
                num_levels=num_levels,
                num_heads=num_heads,
                num_points=num_points,
                ffn_dim=ffn_dim,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        valid_ratios: Tensor,
        padding_mask: Tensor,
    ) -> Tensor:
        """Let every token attend to a few points of all levels, through all layers.

        Args:
            tokens: (B, S, D), all levels flattened, finest first.
            position: (B, S, D), sine and level embedding.
            spatial_shapes: (height, width) of each level.
            valid_ratios: (B, L, 2) float32, share of width and height that is not padding.
            padding_mask: (B, S) bool, True = padding.

        Returns:
            (B, S, D) the memory.
        """
        reference_points = cell_centres(spatial_shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]
        for layer in self.layers:
            inputs = (tokens, position, reference_points, spatial_shapes, padding_mask)
            if self.recompute and self.training:
                tokens = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                tokens = layer(*inputs)
        return tokens


def cell_centres(spatial_shapes: Sequence[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """(B, S, 2) float32: x and y of each cell's centre, 0-1 of the image before padding."""
    device = valid_ratios.device
    parts = []
    for level, (height, width) in enumerate(spatial_shapes):
        y = torch.arange(height, device=device) + 0.5
        x = torch.arange(width, device=device) + 0.5
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        valid_width = valid_ratios[:, level, 0, None] * width
        valid_height = valid_ratios[:, level, 1, None] * height
        parts.append(torch.stack((grid_x.flatten()[None] / valid_width, grid_y.flatten()[None] / valid_height), -1))
    return torch.cat(parts, dim=1)
