"""Parameters and operations of a detector with a ResNet-50, by arithmetic: building and tracing one takes seconds.

A multiply-add counts as two operations. As in PyTorch's counter, products with weights count; the sampling of
deformable attention, norms and the product of queries and keys do not. Tests compare both numbers with the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Options of the model that decide its operations, with the published DINO R50 4-scale's values, where 10^12 operations
# for an image are taken from a table, to 1 percent.
PUBLISHED = {
    "backbone": "resnet50", "backbone_norm": "frozen", "feature_strides": (8, 16, 32), "num_feature_levels": 4,
    "hidden_dim": 256, "num_heads": 8, "num_points": 4, "ffn_dim": 2048, "num_encoder_layers": 6,
    "num_decoder_layers": 6, "num_queries": 900, "query_groups": 1,
}  # fmt: skip
PUBLISHED_CONSTANT, PUBLISHED_PER_PIXEL = 0.0208, 5.11e-7
STRIDES = ((8, 16, 32), (4, 8, 16, 32))  # of the backbone's maps, those that are known here
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # of a ResNet-50: inner width and blocks
EXPANSION = 4  # what a block gives, by its inner width
COORDINATES = 4


def is_published(model: Mapping[str, Any]) -> bool:
    """Whether a model has the operations of the published one.

    Args:
        model: options of `DINOModule`, by name.
    """
    return all(_plain(model[name]) == value for name, value in PUBLISHED.items())


def is_known(model: Mapping[str, Any]) -> bool:
    """Whether the size of a model is known here, and it can be built at all; for others ask the model itself.

    Args:
        model: options of `DINOModule`, by name, whose numbers `check_numbers` has accepted.
    """
    return (
        (model["backbone"], model["backbone_norm"], model["freeze"]) == ("resnet50", "frozen", None)
        and 0 <= model["trainable_backbone_layers"] <= len(STAGES) + 1
        and _plain(model["feature_strides"]) in STRIDES
        and model["num_feature_levels"] >= len(model["feature_strides"])
        and model["hidden_dim"] % 4 == 0
        and model["hidden_dim"] % model["num_heads"] == 0
    )


def published_operations(height: int, width: int) -> float:
    """10^12 operations of a forward pass of one image of this size by the published model, from the table."""
    return PUBLISHED_CONSTANT + PUBLISHED_PER_PIXEL * height * width


def operations(model: Mapping[str, Any], num_classes: int, height: int, width: int) -> float:
    """10^12 operations of a forward pass of one image of this size, by any model that `is_known`."""
    convolutions = [*_backbone(height, width), *_neck(model, height, width)]
    sizes = [(each.height, each.width) for each in _neck(model, height, width)]
    tokens = sum(rows * columns for rows, columns in sizes)
    dim, layers = model["hidden_dim"], model["num_decoder_layers"]
    queries = min(model["num_queries"], tokens)
    square, feed_forward = dim * dim, 2 * dim * model["ffn_dim"]
    sampling = 3 * dim * _points(model)  # two offsets and a weight for each point
    box_head = 2 * square + COORDINATES * dim
    encoder = model["num_encoder_layers"] * tokens * (sampling + 2 * square + feed_forward)
    selection = tokens * (square + dim * num_classes) + queries * box_head
    decoder = layers * (tokens * square + queries * (5 * square + sampling + feed_forward))
    positions = layers * queries * 3 * square
    heads = queries * ((2 * layers - 1) * box_head + layers * dim * num_classes)  # all but the last look forward twice
    products = sum(each.products for each in convolutions) + encoder + selection + decoder + positions + heads
    return float(2 * products / 1e12)


def parameters(model: Mapping[str, Any], num_classes: int) -> int:
    """The trainable parameters of any model that `is_known`."""
    dim, inner, layers = model["hidden_dim"], model["ffn_dim"], model["num_decoder_layers"]
    first_trained = len(STAGES) + 1 - model["trainable_backbone_layers"]
    backbone = sum(each.weights for each in _backbone(64, 64) if each.stage >= first_trained)
    neck = sum(each.weights + 3 * dim for each in _neck(model, 64, 64))  # a bias and a norm
    norm, square = 2 * dim, _linear(dim, dim)
    sampling = _linear(dim, 3 * _points(model)) + 2 * square
    feed_forward = _linear(dim, inner) + _linear(inner, dim)
    box_head, class_head = 2 * square + _linear(dim, COORDINATES), _linear(dim, num_classes)
    encoder = model["num_encoder_layers"] * (sampling + feed_forward + 2 * norm)
    decoder = layers * (4 * square + sampling + feed_forward + 3 * norm) + norm + _linear(2 * dim, dim) + square
    heads = (1 if model["shared_heads"] else layers) * (box_head + class_head)
    contents = dim * model["num_queries"] * model["query_groups"]
    selection = square + norm + box_head + class_head
    embeddings = dim * (model["num_feature_levels"] + num_classes + 1)
    return int(backbone + neck + encoder + decoder + heads + contents + selection + embeddings)


@dataclass(frozen=True)
class _Convolution:
    """One convolution: its stage (of the backbone, 0 for the first), channels, kernel, and size of its output."""

    stage: int
    inputs: int
    outputs: int
    kernel: int
    height: int
    width: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs * self.kernel**2

    @property
    def products(self) -> int:
        return self.weights * self.height * self.width


def _backbone(height: int, width: int) -> Iterator[_Convolution]:
    """The convolutions of a ResNet-50 for an image of this size."""
    size = _halved((height, width))
    yield _Convolution(0, 3, 64, 7, *size)
    size, channels = _halved(size), 64
    for stage, (inner, blocks) in enumerate(STAGES, start=1):
        outputs = EXPANSION * inner
        for block in range(blocks):
            yield _Convolution(stage, channels, inner, 1, *size)
            if block == 0:
                size = size if stage == 1 else _halved(size)
                yield _Convolution(stage, channels, outputs, 1, *size)  # the shortcut
            yield _Convolution(stage, inner, inner, 3, *size)
            yield _Convolution(stage, inner, outputs, 1, *size)
            channels = outputs


def _neck(model: Mapping[str, Any], height: int, width: int) -> Iterator[_Convolution]:
    """The convolutions that make the feature levels, finest first."""
    dim = model["hidden_dim"]
    size = (height, width)
    channels = {2 ** (stage + 1): EXPANSION * inner for stage, (inner, _) in enumerate(STAGES, start=1)}
    maps = {}
    for exponent in range(1, 6):
        size = _halved(size)
        maps[2**exponent] = size
    for stride in model["feature_strides"]:
        yield _Convolution(0, channels[stride], dim, 1, *maps[stride])
    inputs = channels[model["feature_strides"][-1]]
    for _ in range(model["num_feature_levels"] - len(model["feature_strides"])):
        size = _halved(size)
        yield _Convolution(0, inputs, dim, 3, *size)
        inputs = dim


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(size[0] / 2), math.ceil(size[1] / 2)


def _points(model: Mapping[str, Any]) -> int:
    """The sampling points of a query, over all heads and levels."""
    return int(model["num_heads"] * model["num_feature_levels"] * model["num_points"])


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
