"""From backbone maps to feature levels of one width (DINO, arXiv 2203.03605, appendix D.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class Neck(nn.Module):
    """A 1x1 convolution for each backbone map and strided 3x3 ones for the extra levels, each with GroupNorm.

    Args:
        in_channels: channels of the backbone maps, finest first.
        hidden_dim: channels of every level.
        num_levels: feature levels; those past the backbone's come from its last map, then from one another.

    Raises:
        ValueError: fewer levels than backbone maps.
    """

    def __init__(self, *, in_channels: Sequence[int], hidden_dim: int, num_levels: int) -> None:
        super().__init__()
        if num_levels < len(in_channels):
            raise ValueError(
                f"num_feature_levels={num_levels} is less than the {len(in_channels)} backbone maps; "
                "ask for fewer feature_strides or more levels."
            )
        groups = math.gcd(32, hidden_dim)
        layers: list[nn.Module] = []
        for level in range(num_levels):
            if level < len(in_channels):
                conv = nn.Conv2d(in_channels[level], hidden_dim, kernel_size=1)
            else:
                channels = in_channels[-1] if level == len(in_channels) else hidden_dim
                conv = nn.Conv2d(channels, hidden_dim, kernel_size=3, stride=2, padding=1)
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            layers.append(nn.Sequential(conv, nn.GroupNorm(groups, hidden_dim)))
        self.projections = nn.ModuleList(layers)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """(B, C_l, H_l, W_l) backbone maps -> (B, D, H_l, W_l) levels, finest first."""
        levels = [projection(feature) for projection, feature in zip(self.projections, features, strict=False)]
        for index in range(len(features), len(self.projections)):
            levels.append(self.projections[index](features[-1] if index == len(features) else levels[-1]))
        return levels
