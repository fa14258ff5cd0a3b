"""The attention layer around the sampling core: projections, offsets, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dino_lightning.model.deformable_attention.dispatch import sample
from dino_lightning.model.lower_precision import products


class MultiScaleDeformableAttention(nn.Module):
    """Each query reads a few learned points of every feature level (arXiv 2010.04159, section 4.1).

    Args:
        hidden_dim: D, a multiple of `num_heads`.
        num_levels: L feature levels.
        num_heads: H.
        num_points: P points for each head and level.

    Raises:
        ValueError: `hidden_dim` is not a multiple of `num_heads`.
    """

    def __init__(self, *, hidden_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim={hidden_dim} is not a multiple of num_heads={num_heads}.")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.sample = sample
        self.sampling_offsets = nn.Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    def keep_sampling_out_of_compilation(self) -> None:
        """Leave the sampling core as it is when the layer around it is compiled.

        For a CPU: what the compiler makes of bilinear sampling there takes twice as long as PyTorch's own.
        """
        self.sample = torch.compiler.disable(sample)  # type: ignore[no-untyped-call]  # torch has no types here

    def reset_parameters(self) -> None:
        """Heads start by looking in evenly spread directions, point p at distance p + 1, all weights equal."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[None, None, :, None]  # (H, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
        for weight in (
            self.sampling_offsets.weight,
            self.attention_weights.weight,
            self.attention_weights.bias,
        ):
            nn.init.zeros_(weight)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Gather the values that each query attends to, weighted and projected.

        Args:
            query: (B, Q, D), position already added.
            reference_points: (B, Q, L, 2) points or (B, Q, L, 4) boxes cxcywh, 0-1 of the padded map.
            value: (B, S, D), the flattened maps.
            spatial_shapes: (height, width) of each level.
            padding_mask: (B, S) bool, True = padding, whose value counts as zero.

        Returns:
            (B, Q, D).
        """
        project, *others = products(self.value_proj, self.sampling_offsets, self.attention_weights, self.output_proj)
        projected = without_padding(project(value), padding_mask)
        return self._attend(query, reference_points, projected, spatial_shapes, others)

    def attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        projected: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
    ) -> Tensor:
        """As `forward`, for values that have been through `value_proj`: (B, S, D), zero where there is padding."""
        others = products(self.sampling_offsets, self.attention_weights, self.output_proj)
        return self._attend(query, reference_points, projected, spatial_shapes, others)

    def _attend(
        self,
        query: Tensor,
        reference_points: Tensor,
        projected: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        layers: Sequence[Callable[[Tensor], Tensor]],
    ) -> Tensor:
        to_offsets, to_logits, to_output = layers
        offsets, logits = self.offsets_and_logits(query, to_offsets, to_logits)
        values = projected.view(*projected.shape[:2], self.num_heads, projected.shape[2] // self.num_heads)
        return to_output(self.sample(values, spatial_shapes, reference_points, offsets, logits))

    def offsets_and_logits(
        self, query: Tensor, to_offsets: Callable[[Tensor], Tensor], to_logits: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Where (B, Q, D) queries look, and how much each place counts before the softmax.

        Args:
            query: position already added.
            to_offsets: computes what `sampling_offsets` does.
            to_logits: computes what `attention_weights` does.

        Returns:
            (B, Q, H, L, P, 2) in cells of each level, and (B, Q, H, L * P).
        """
        places = (query.shape[0], query.shape[1], self.num_heads)
        offsets = to_offsets(query).view(*places, self.num_levels, self.num_points, 2)
        return offsets, to_logits(query).view(*places, self.num_levels * self.num_points)


def without_padding(values: Tensor, padding_mask: Tensor | None) -> Tensor:
    """(B, S, X) values, zero where (B, S) `padding_mask` is True."""
    return values if padding_mask is None else values.masked_fill(padding_mask[..., None], 0.0)
