"""Feature maps at known strides from torchvision's classification networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d

from dino_lightning.model.kept_result import KeptResult
from dino_lightning.model.large_backbones import LARGE_BACKBONES
from dino_lightning.model.lower_precision import lower_precision, scaled_to

NormKind = Literal["frozen", "batch", "group"]

_RESNET_STEPS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NUM_STAGES = 5  # strides 2, 4, 8, 16, 32


class Backbone(nn.Module):
    """A torchvision network cut where the feature maps of the wanted strides come out.

    The parts keep torchvision's own names under `body`, so that its weights load by name.

    Args:
        name: a ResNet (`resnet18`, `resnet50`, ...), any torchvision network with a `features` sequence
            (`mobilenet_v2`, `mobilenet_v3_large`, `convnext_tiny`, `swin_t`, `efficientnet_b0`, ...), `swin_l`,
            `swin_l_224`, `swin_b_384` or `convnext_xl` as in published DINO models, or `resnet10`, a narrow
            four-block ResNet of our own (32 to 256 channels) for training from scratch on a CPU.
        strides: strides of the maps to return, from 4, 8, 16, 32, ascending.
        norm: what batch norms become: `frozen` (fixed statistics and affine, as published; needs pretrained weights),
            `batch` (left alone) or `group` (GroupNorm, for training from scratch with small batches).
        trainable_layers: how many of the five stages train, counted from the last (torchvision's convention);
            3 leaves the stem and the first stage fixed, as published.

    Raises:
        ValueError: an unknown name or a stride the network does not have.
    """

    def __init__(
        self,
        *,
        name: str,
        strides: Sequence[int] = (8, 16, 32),
        norm: NormKind = "frozen",
        trainable_layers: int = 3,
    ) -> None:
        super().__init__()
        check_trainable_layers(trainable_layers)
        self.name, self.norm = name, norm
        network = _build_network(name)
        self._steps = _RESNET_STEPS if hasattr(network, "layer4") else _feature_steps(network)
        self._channels_last = isinstance(network, torchvision.models.SwinTransformer)
        self.body = nn.Module()
        for step in self._steps:
            top = step.split(".", maxsplit=1)[0]
            if not hasattr(self.body, top):
                self.body.add_module(top, network.get_submodule(top))
        step_strides, step_channels = self._probe()
        check_strides(name, strides, step_strides)
        last = len(step_strides) - 1 - step_strides[::-1].index(strides[-1])
        self._drop_after(last)
        self._taps = tuple(last - step_strides[last::-1].index(stride) for stride in strides)
        self.channels = tuple(step_channels[tap] for tap in self._taps)
        self.norms = nn.ModuleDict()
        if isinstance(network, torchvision.models.SwinTransformer | torchvision.models.ConvNeXt):
            # these networks normalise only before their classifier; the maps need a norm of their own
            for tap, channels in zip(self._taps, self.channels, strict=True):
                self.norms[str(tap)] = nn.LayerNorm(channels, eps=1e-5 if self._channels_last else 1e-6)
        _replace_batch_norms(self.body, norm)
        self._freeze(step_strides, trainable_layers)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) normalised images -> (B, C, H / stride, W / stride) maps, finest first."""
        maps = []
        # Convolutions are fastest in channels-last memory, and hand it on; group norms are not.
        layout = torch.contiguous_format if self.norm == "group" else torch.channels_last
        x = images.contiguous(memory_format=layout)
        for index, step in enumerate(self._steps):
            x = self.body.get_submodule(step)(x)
            if index in self._taps:
                maps.append(self._as_map(x, index))
        return maps

    def _as_map(self, x: Tensor, index: int) -> Tensor:
        if not self._channels_last:
            if str(index) not in self.norms:
                return x
            x = x.permute(0, 2, 3, 1)
        normed: Tensor = self.norms[str(index)](x) if str(index) in self.norms else x
        return normed.permute(0, 3, 1, 2).contiguous()

    def _probe(self) -> tuple[list[int], list[int]]:
        """Stride and channels after each step, by running a small blank image through."""
        side = 64
        strides, channels = [], []
        was_training = self.body.training
        self.body.eval()
        with torch.no_grad():
            x = torch.zeros(1, 3, side, side)
            for step in self._steps:
                x = self.body.get_submodule(step)(x)
                height, depth = (x.shape[1], x.shape[3]) if self._channels_last else (x.shape[2], x.shape[1])
                strides.append(side // height)
                channels.append(depth)
        self.body.train(was_training)
        return strides, channels

    def _drop_after(self, last: int) -> None:
        """Remove the steps no map needs, so that they neither run nor count as unused parameters."""
        for step in self._steps[last + 1 :]:
            parent, _, child = step.rpartition(".")
            delattr(self.body.get_submodule(parent) if parent else self.body, child)
        self._steps = self._steps[: last + 1]

    def _freeze(self, step_strides: Sequence[int], trainable_layers: int) -> None:
        first_trained_stage = NUM_STAGES - trainable_layers
        for step, stride in zip(self._steps, step_strides, strict=False):
            stage = 0 if step in ("conv1", "bn1") else stage_of_stride(stride)
            if stage < first_trained_stage:
                self.body.get_submodule(step).requires_grad_(False)


def check_trainable_layers(trainable_layers: int) -> None:
    """Refuse a number of trained stages that no backbone has.

    Raises:
        ValueError: it is not between 0 and `NUM_STAGES`.
    """
    if not 0 <= trainable_layers <= NUM_STAGES:
        raise ValueError(f"trainable_backbone_layers={trainable_layers} is not between 0 and {NUM_STAGES}.")


def check_strides(name: str, strides: Sequence[int], known: Iterable[int]) -> None:
    """Refuse strides of maps that a network does not have.

    Args:
        name: of the network.
        strides: those wanted.
        known: those that it has.

    Raises:
        ValueError: one is missing, there is none, or they do not ascend.
    """
    known = set(known)
    if not strides or list(strides) != sorted(set(strides)) or not known.issuperset(strides):
        raise ValueError(
            f"feature_strides={list(strides)} must be ascending strides that {name} has: "
            f"{sorted(known & {4, 8, 16, 32})}."
        )


def stage_of_stride(stride: int) -> int:
    """The stage that ends with the map of a stride: 0 for 2 (and less), 1 for 4, to 4 for 32."""
    return min(max(int(math.log2(stride)) - 1, 0), NUM_STAGES - 1)


def pretrained_state(name: str, weights: str) -> Mapping[str, Tensor]:
    """The torchvision weights called `weights` for network `name`, downloaded into torchvision's cache.

    Raises:
        ValueError: no such weights, or a download that failed.
    """
    if name not in torchvision.models.list_models():
        raise ValueError(f"{name} has no torchvision weights; set backbone_weights to null or to a file.")
    choices = torchvision.models.get_model_weights(name)
    try:
        entry = choices[weights]
    except KeyError as error:
        raise ValueError(
            f"{name} has no torchvision weights {weights!r}; there are {[choice.name for choice in choices]}."
        ) from error
    try:
        downloaded: Mapping[str, Tensor] = entry.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: another checksum
        raise ValueError(
            f"Downloading the {weights} weights of {name} failed ({error}). Connect to the internet, or pass a local "
            "file as backbone_weights, or null to start from random weights."
        ) from error
    return downloaded


class _NarrowResNet(nn.Module):
    """A ResNet of one basic block per stage and half the usual width."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 128, 256)
        self.conv1 = nn.Conv2d(3, widths[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = widths[0]
        for index, width in enumerate(widths, start=1):
            stride = 1 if index == 1 else 2
            shortcut = None
            if channels != width or stride != 1:
                shortcut = nn.Sequential(
                    nn.Conv2d(channels, width, kernel_size=1, stride=stride, bias=False),
                    nn.BatchNorm2d(width),
                )
            self.add_module(f"layer{index}", nn.Sequential(BasicBlock(channels, width, stride, shortcut)))
            channels = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _build_network(name: str) -> nn.Module:
    if name == "resnet10":
        return _NarrowResNet()
    if name in LARGE_BACKBONES:
        return LARGE_BACKBONES[name]()
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise ValueError(
            f"Unknown backbone {name!r}. Use resnet10, or a torchvision network such as resnet18, resnet50, "
            "mobilenet_v2, convnext_tiny, swin_t or efficientnet_b0, or swin_l, swin_l_224, swin_b_384 or convnext_xl."
        )
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    if not hasattr(network, "layer4") and not isinstance(getattr(network, "features", None), nn.Sequential):
        raise ValueError(f"Backbone {name!r} yields no feature maps at known strides; try a ResNet or mobilenet_v2.")
    return network


def _feature_steps(network: nn.Module) -> tuple[str, ...]:
    return tuple(f"features.{name}" for name, _ in network.get_submodule("features").named_children())


def _replace_batch_norms(module: nn.Module, norm: NormKind) -> None:
    if norm == "batch":
        return
    before, before_name = nn.Module(), ""  # what is registered before a norm comes before it in the network, too
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            if norm == "group":
                setattr(module, name, nn.GroupNorm(math.gcd(32, child.num_features), child.num_features))
            elif type(before) is nn.Conv2d and before.bias is None:
                folded = _FoldedNorm(child.num_features, eps=child.eps)
                setattr(module, before_name, _FoldingConv2d(before, folded))
                setattr(module, name, folded)
            else:
                setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=child.eps))
        else:
            _replace_batch_norms(child, norm)
        before, before_name = child, name


class _FoldedNorm(FrozenBatchNorm2d):  # type: ignore[misc]  # torchvision has no types
    """A frozen batch norm that the convolution before it carries out."""

    def forward(self, x: Tensor) -> Tensor:
        """Nothing is left to do."""
        return x

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """What the norm multiplies by and adds, each (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale


class _FoldingConv2d(nn.Conv2d):
    """A convolution that scales its weights by the frozen norm after it, rather than all of its output.

    The names and values of parameters and statistics stay those of the two layers. What does not change from step to
    step is computed once: the statistics' scale and shift, and, where the convolution does not train, its weights too.
    """

    def __init__(self, conv: nn.Conv2d, norm: _FoldedNorm) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # torch keeps them as tuples of any length
            conv.stride,  # type: ignore[arg-type]  # as above
            conv.padding,  # type: ignore[arg-type]  # as above
            conv.dilation,  # type: ignore[arg-type]  # as above
            conv.groups,
            bias=False,
            device="meta",  # no random numbers are drawn for weights that are replaced at once
        )
        self.weight = conv.weight
        self._norm = (norm,)  # in a tuple: it is registered under its own name already
        self._statistics = KeptResult[tuple[Tensor, Tensor]]()
        self._fixed = KeptResult[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), convolved and normed."""
        norm, weight = self._norm[0], self.weight
        dtype = lower_precision(x.device.type) or weight.dtype
        inputs = (norm.weight, norm.bias, norm.running_mean, norm.running_var)

        def statistics() -> tuple[Tensor, Tensor]:
            scale, shift = norm.scale_and_shift()
            return scale[:, None, None, None], shift.to(dtype)

        scale, shift = self._statistics.of(inputs, dtype, statistics)
        if weight.requires_grad:
            scaled = scaled_to(weight, scale, dtype)
        else:
            scaled = self._fixed.of((*inputs, weight), dtype, lambda: scaled_to(weight, scale, dtype))
        convolved: Tensor = self._conv_forward(x, scaled, shift)
        return convolved
