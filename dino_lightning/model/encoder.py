"""The deformable encoder: every cell of every level attends to a few points of all levels (arXiv 2010.04159)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention
from dino_lightning.model.feed_forward import feed_forward
from dino_lightning.model.residual_norm import Normed, residual_norm
from dino_lightning.model.token_geometry import TokenGeometry


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
        tokens: Normed,
        position: Tensor,
        reference_points: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        padding_mask: Tensor | None,
        copies: bool = False,
        level_embedding: Tensor | None = None,
    ) -> Normed:
        """(B, S, D) tokens and their positions -> (B, S, D), with copies for another layer if it is to have them."""
        attended = self.self_attention(
            tokens.at(position), reference_points, tokens.for_products(), spatial_shapes, padding_mask
        )
        tokens = residual_norm(tokens.exact, self.dropout(attended), self.norm1)
        hidden = feed_forward(tokens.for_products(), self.linear1, self.linear2, self.dropout)
        return residual_norm(
            tokens.exact,
            self.dropout(hidden),
            self.norm2,
            position=position,
            copies=copies,
            level_embedding=level_embedding,
            level_sizes=[height * width for height, width in spatial_shapes],
        )


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
        geometry: TokenGeometry,
        level_embedding: Tensor | None = None,
    ) -> Tensor:
        """Let every token attend to a few points of all levels, through all layers.

        Args:
            tokens: (B, S, D), all levels flattened, finest first.
            position: (B or 1, S, D), sine and level embedding.
            geometry: where the tokens lie.
            level_embedding: (L, D), if that alone learns of the position.

        Returns:
            (B, S, D) the memory.
        """
        reference_points = geometry.reference_points().expand(tokens.shape[0], -1, -1, -1)
        stream, others = Normed(tokens), (position, reference_points, geometry.spatial_shapes, geometry.padding_mask)
        for number, layer in enumerate(self.layers, start=1):
            if self.recompute and self.training:
                stream = checkpoint(layer, stream, *others, use_reentrant=False)  # copies would be kept as well
            else:
                stream = layer(stream, *others, copies=number < len(self.layers), level_embedding=level_embedding)
        return stream.exact
