"""The backbones of published DINO models that torchvision has not, or computes otherwise at the borders of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ConvNeXt, SwinTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    SwinTransformerBlock,
    shifted_window_attention,
)

_PATCH = 4


def swin(
    *, embed_dim: int, depths: Sequence[int], num_heads: Sequence[int], window: int, drop_path: float = 0.2
) -> SwinTransformer:
    """A Swin Transformer (arXiv 2103.14030) that computes what those inside published detectors compute.

    It differs from torchvision's own in two ways, both for maps that do not fit: images are padded to a multiple of
    the patch, and odd blocks shift and mask a map that is smaller than the window, too.

    Args:
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        window: side of the attention windows, in tokens.
        drop_path: probability of leaving out the last block in training; those before it less, linearly.
    """
    network = SwinTransformer(
        patch_size=[_PATCH, _PATCH],
        embed_dim=embed_dim,
        depths=list(depths),
        num_heads=list(num_heads),
        window_size=[window, window],
        stochastic_depth_prob=drop_path,
        num_classes=1,  # the classifier is left out
        block=partial(SwinTransformerBlock, attn_layer=_AlwaysShifted),
    )
    network.features[0][0] = _PaddedPatches(3, embed_dim, kernel_size=_PATCH, stride=_PATCH)
    return network


def convnext(*, depths: Sequence[int], widths: Sequence[int]) -> ConvNeXt:
    """A ConvNeXt (arXiv 2201.03545) as in published detectors: no drop path.

    Args:
        depths: blocks of each stage.
        widths: channels of each stage.
    """
    following = [*widths[1:], None]
    return ConvNeXt(
        [CNBlockConfig(width, after, depth) for width, after, depth in zip(widths, following, depths, strict=True)],
        num_classes=1,  # the classifier is left out
    )


LARGE_BACKBONES: dict[str, Callable[[], nn.Module]] = {
    # by the names and with the drop paths of torchvision's, whose weights fit
    "swin_t": partial(swin, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window=7, drop_path=0.2),
    "swin_s": partial(swin, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), window=7, drop_path=0.3),
    "swin_b": partial(swin, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window=7, drop_path=0.5),
    # trained on images of another size, or with more channels
    "swin_b_384": partial(swin, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window=12),
    "swin_l_224": partial(swin, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window=7),
    "swin_l": partial(swin, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window=12),
    "convnext_xl": partial(convnext, depths=(3, 3, 27, 3), widths=(256, 512, 1024, 2048)),
}


class _PaddedPatches(nn.Conv2d):
    """The convolution that makes tokens of patches, the last row and column of which may be cut off by the image."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 4, W / 4), rounded up."""
        height, width = x.shape[-2:]
        padded: Tensor = super().forward(F.pad(x, (0, -width % _PATCH, 0, -height % _PATCH)))
        return padded


class _AlwaysShifted(ShiftedWindowAttention):  # type: ignore[misc]  # torchvision has no types
    """Shifted windows also along an axis with a single window, where torchvision leaves out the shift.

    To shift a map of one window only reorders its tokens, except that those that wrap around are kept from seeing the
    others. So the mask alone does it, added to the position bias.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        bias = self.get_relative_position_bias()
        sizes = zip(self.window_size, self.shift_size, x.shape[1:3], strict=True)
        borders = [shift if size <= window else 0 for window, shift, size in sizes]
        if any(borders):
            bias = bias - 100.0 * self._separated(borders, x.device)
        attended: Tensor = shifted_window_attention(
            x,
            self.qkv.weight,
            self.proj.weight,
            bias,
            self.window_size,
            self.num_heads,
            shift_size=self.shift_size,
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            training=self.training,
        )
        return attended

    def _separated(self, borders: Sequence[int], device: torch.device) -> Tensor:
        """(T, T) bool for the T tokens of a window, True for pairs with a border (row, column; 0 for none) between."""
        sides = [torch.arange(side, device=device) >= at for side, at in zip(self.window_size, borders, strict=True)]
        rows, columns = (side.flatten() for side in torch.meshgrid(*sides, indexing="ij"))
        return (rows[:, None] != rows) | (columns[:, None] != columns)
