"""Feature maps at known strides from the networks of the timm library, an optional package."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_lightning.model.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NUM_STAGES,
    NormKind,
    check_strides,
    check_trainable_layers,
    stage_of_stride,
)

PREFIX = "timm/"
_MULTIPLE = 32  # sides that every network of these strides takes
_PROBE = (3 * _MULTIPLE, 5 * _MULTIPLE)
_SIZE_OPTIONS: tuple[dict[str, bool], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmBackbone(nn.Module):
    """A network of timm cut where the feature maps of the wanted strides come out; the interface is `Backbone`'s.

    The parts keep the names that timm gives them in its own feature extractors, under `body`.

    Args:
        name: `timm/` and the name of the network, with the tag of its weights if they are not timm's default ones:
            `timm/convnextv2_tiny`, `timm/resnet50.a1_in1k`.
        strides: strides of the maps to return, from 4, 8, 16, 32, ascending.
        norm: what batch norms become, see `Backbone`; networks with other norms keep them.
        trainable_layers: how many of the five stages train, counted from the last. Stage 0 is what lies before the map
            of stride 4, if the network has a map of stride 2; a stage ends with the map of its stride.

    Raises:
        ValueError: timm is not installed, has no such network, or the network has no maps of these strides for images
            of any size; or only some stages shall train where timm does not tell them apart.
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
        self.name, self.norm, self.strides = name, norm, tuple(strides)
        self.body = _features(name, self.strides)
        info = self.body.feature_info
        self.channels: tuple[int, ...] = tuple(info.channels())
        self._channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        unused = self._check_maps()
        self.norms = nn.ModuleDict()
        if any(isinstance(module, nn.LayerNorm) for module in self.body.modules()):
            # as in `Backbone`: these networks normalise only before their classifier
            for stride, channels in zip(self.strides, self.channels, strict=True):
                self.norms[str(stride)] = nn.LayerNorm(channels, eps=1e-6)
        self.stages, all_known = self._stages()
        if not all_known and 0 < trainable_layers < NUM_STAGES:
            raise ValueError(
                f"trainable_backbone_layers={trainable_layers}: timm does not tell the stages of {name} apart; set it "
                f"to {NUM_STAGES} or 0, to train all of them or none."
            )
        settings = self.body.pretrained_cfg
        mean, std = tuple(settings.get("mean", IMAGENET_MEAN)), tuple(settings.get("std", IMAGENET_STD))
        self._as_it_is = (mean, std) == (IMAGENET_MEAN, IMAGENET_STD)
        scale = torch.tensor(IMAGENET_STD) / torch.tensor(std)
        shift = (torch.tensor(IMAGENET_MEAN) - torch.tensor(mean)) / torch.tensor(std)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale.view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", shift.view(1, 3, 1, 1), persistent=False)
        self.body = _with_norms(self.body, norm)
        for key, parameter in self.body.named_parameters():
            if key in unused or self.stages[f"body.{key}"] < NUM_STAGES - trainable_layers:
                parameter.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) images, normalised as for ImageNet -> (B, C, H / stride, W / stride) maps, finest first."""
        height, width = images.shape[-2:]
        if not self._as_it_is:  # weights that were trained on otherwise normalised images
            images = images * self.scale + self.shift
        layout = torch.contiguous_format if self.norm == "group" else torch.channels_last
        # by whole numbers above zero: ONNX rounds quotients of others in another direction than Python
        right, below = (_quotient(side, _MULTIPLE) * _MULTIPLE - side for side in (width, height))
        padded = F.pad(images, (0, right, 0, below)).contiguous(memory_format=layout)
        maps = []
        for stride, found in zip(self.strides, self.body(padded), strict=True):
            x = found if self._channels_last else found.permute(0, 2, 3, 1)
            if str(stride) in self.norms:
                x = self.norms[str(stride)](x)
            rows, columns = _quotient(height, stride), _quotient(width, stride)
            maps.append(x[:, :rows, :columns].permute(0, 3, 1, 2).contiguous())
        return maps

    def _check_maps(self) -> set[str]:
        """Run a blank image through, of a size that the network was not made for; the parameters that take no part."""
        self.body.eval()
        names, parameters = zip(*self.body.named_parameters(), strict=True)
        try:
            with torch.enable_grad():
                maps = self.body(torch.zeros(1, 3, *_PROBE))
                gradients = torch.autograd.grad([found.sum() for found in maps], parameters, allow_unused=True)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"Backbone {self.name!r} takes images of one size only ({error}).") from error
        self.body.train()
        for stride, channels, found in zip(self.strides, self.channels, maps, strict=True):
            expected = (_PROBE[0] // stride, _PROBE[1] // stride, channels)
            shape = tuple(found.shape[1:]) if self._channels_last else (*found.shape[2:], found.shape[1])
            if shape != expected:
                raise ValueError(f"Backbone {self.name!r} has no map of stride {stride} for images of any size.")
        return {name for name, gradient in zip(names, gradients, strict=True) if gradient is None}

    def _stages(self) -> tuple[dict[str, int], bool]:
        """The stage of each parameter, 0 to 4, each of which ends with a map; and whether all ends are known."""
        order = {name: index for index, (name, _) in enumerate(self.body.named_modules())}
        every = self.body.feature_info.info  # of the maps that are not in use, too
        ends = {stage_of_stride(entry["reduction"]): _end_of(entry["module"], order) for entry in every}
        stages = {}
        for key, _ in self.named_parameters():
            index = order.get(key.removeprefix("body.").rpartition(".")[0], len(order))
            stages[key] = min((stage for stage, end in ends.items() if index <= end), default=NUM_STAGES - 1)
        return stages, min(ends.values()) >= 0


def timm_state(name: str, strides: Sequence[int], file: Path | None = None) -> dict[str, Tensor]:
    """Timm's own weights of a network, as the state dict of a `TimmBackbone` of these strides.

    Args:
        name: as `TimmBackbone` takes it, with the tag of the weights.
        strides: of the maps in use.
        file: a file of such weights; fetched by timm from the Hugging Face hub, or taken from its cache, if left out.

    Raises:
        ValueError: no such weights, a failed download, or a file that does not fit.
    """
    given: dict[str, Any] = {} if file is None else {"pretrained_cfg_overlay": {"file": str(file)}}
    try:
        if file is not None:  # what does not fit a whole network is an error; a feature extractor would leave it out
            import timm

            timm.create_model(name.removeprefix(PREFIX), pretrained=True, **given)
        body = _features(name, strides, pretrained=True, **given)
    except Exception as error:  # of timm, of the hub's client, of its HTTP library
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise ValueError(
            f"The weights of {name} in {file} cannot be used ({first})."
            if file is not None
            else f"Fetching the weights of {name} failed ({first}). Connect to the internet, or pass a local file of "
            "them as backbone_weights, or null to start from random weights."
        ) from error
    return {f"body.{key}": value for key, value in body.state_dict().items()}


def _features(name: str, strides: Sequence[int], **options: Any) -> Any:
    """Timm's feature extractor of a network with the maps of these strides alone."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"The backbone {name} needs the package timm: pip install 'dino-lightning[timm]', or pip install timm."
        ) from error
    network = name.removeprefix(PREFIX)
    if not timm.is_model(network.partition(".")[0]):
        near = difflib.get_close_matches(network, timm.list_models(), n=3)
        hint = f" Did you mean {' or '.join(PREFIX + other for other in near)}?" if near else ""
        raise ValueError(f"Unknown backbone {name!r}: timm {timm.__version__} has no such network.{hint}")
    try:
        size_options, info = _accepted(timm, network)
    except RuntimeError as error:  # an unknown tag, or no feature extractor
        raise ValueError(f"Backbone {name!r} cannot be built by timm ({error}).") from error
    found = {entry["reduction"]: index for index, entry in info}
    check_strides(name, strides, found)
    indices = tuple(found[stride] for stride in strides)
    return timm.create_model(network, features_only=True, out_indices=indices, **size_options, **options)


def _accepted(timm: Any, network: str) -> tuple[dict[str, bool], list[tuple[int, dict[str, Any]]]]:
    """The option by which a network takes images of any size, and its maps with their indices."""
    for options in _SIZE_OPTIONS:
        try:
            built = timm.create_model(network, features_only=True, **options)
        except TypeError:  # not an option of this network
            continue
        info = built.feature_info
        return options, list(zip(info.out_indices, info.get_dicts(), strict=True))
    raise ValueError(f"Backbone {PREFIX + network!r} has no feature extractor in timm.")


def _quotient(side: int, part: int) -> int:
    """Rounded up."""
    return (side + part - 1) // part


def _end_of(module: str, order: Mapping[str, int]) -> int:
    """The place of the last part of a module; feature extractors flatten or wrap the names that timm's tables have."""
    parts = module.split(".")
    names = [".".join(("_".join(parts[:count]), *parts[count:])) for count in range(1, len(parts) + 1)]
    for name in (*names, f"model.{module}"):
        inside = [place for other, place in order.items() if other == name or other.startswith(f"{name}.")]
        if inside:
            return max(inside)
    return -1


def _with_norms(body: Any, norm: NormKind) -> Any:
    if norm == "batch":
        return body
    from timm import layers

    return layers.freeze_batch_norm_2d(body) if norm == "frozen" else _with_group_norms(body, layers)


def _with_group_norms(module: nn.Module, layers: Any) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            groups = math.gcd(32, child.num_features)
            if isinstance(child, layers.BatchNormAct2d):  # timm's, with the activation inside
                group: nn.Module = layers.GroupNormAct(child.num_features, groups)
                group.act, group.drop = child.act, child.drop
            else:
                group = nn.GroupNorm(groups, child.num_features)
            setattr(module, name, group)
        else:
            _with_group_norms(child, layers)
    return module
