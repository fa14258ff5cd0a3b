"""The assembled detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor, nn

from dino_lightning.model.backbone import IMAGENET_MEAN, IMAGENET_STD, Backbone, NormKind
from dino_lightning.model.compiled_layers import Backend, CompiledLayers
from dino_lightning.model.decoder import Decoder
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention
from dino_lightning.model.denoising import (
    DenoisingQueries,
    DenoisingRule,
    Noise,
    denoising_attention_mask,
    denoising_queries,
    draw_noise,
    num_denoising_groups,
)
from dino_lightning.model.encoder import Encoder
from dino_lightning.model.first_parameters import start_parameters
from dino_lightning.model.kept_result import KeptResult
from dino_lightning.model.neck import Neck
from dino_lightning.model.position_encoding import IMAGE_TEMPERATURE
from dino_lightning.model.prepared_inputs import PreparedInputs, geometry_of
from dino_lightning.model.query_selection import QuerySelection
from dino_lightning.model.timm_backbone import PREFIX, TimmBackbone
from dino_lightning.model.token_geometry import TokenGeometry
from dino_lightning.structures import Batch, DenoisingOutput, ModelOutput

# The arguments beside its sizes that decide which numbers the same weights give; see `DINO.semantics`.
PUBLISHED_SEMANTICS = {"position_temperature": IMAGE_TEMPERATURE, "position_offset": 0.0, "box_epsilon": 1e-3}


class DINO(nn.Module):
    """DETR with improved denoising anchor boxes (arXiv 2203.03605). The defaults are the published R50 4-scale model.

    Args:
        num_classes: K, classes with contiguous labels 0..K-1.
        backbone: name of a torchvision network, see `Backbone`; or `timm/` and the name of a network of the library
            timm, see `TimmBackbone`.
        backbone_norm: `frozen` as published, `batch`, or `group` for training from scratch.
        trainable_backbone_layers: stages of the backbone that train, 0 to 5, counted from the last.
        feature_strides: strides of the backbone maps in use; [8, 16, 32] with 4 levels is "4-scale",
            [4, 8, 16, 32] with 5 levels is "5-scale".
        num_feature_levels: feature levels; those past `feature_strides` come from strided convolutions.
        hidden_dim: D, a multiple of 4 and of `num_heads`.
        num_heads: attention heads.
        num_points: sampling points for each head and level of deformable attention.
        ffn_dim: inner width of the feed-forward networks.
        num_encoder_layers: encoder depth.
        num_decoder_layers: decoder depth.
        num_queries: proposals taken from the encoder; an image with fewer tokens gives fewer.
        num_denoising: denoising boxes to aim for per image, 0 for none; at least one group of all boxes.
        denoising_rule: `published` for the published code's reading of a `num_denoising` below 50: twice as many
            groups, however many boxes an image has.
        label_noise_ratio: twice the share of denoising labels that are replaced.
        box_noise_scale: how far box corners move, in half box sizes.
        denoising_multiple: round the number of denoising queries up to a multiple of this by unused ones; fewer
            different shapes, the same results.
        query_groups: groups of matching queries in training, 1 as published. Each further group has content of its own
            for the same proposals, sees itself alone and is matched one to one, so that every object has as many
            positives as there are groups (Group DETR, arXiv 2207.13085); inference has the first group alone.
        dropout: in encoder and decoder, 0 as published.
        shared_heads: one box head and one class head for all decoder layers, as published; other projects' weights
            have heads of their own for each layer.
        position_temperature: of the image's position embedding, 20 as published; other projects have 10000.
        position_offset: of the cells in it, see `image_position_embedding`; 0 as published, others have -0.5.
        box_epsilon: references of the reported boxes are clamped so far from 0 and 1 before their logit is taken, 1e-3
            as published; mmdetection has 1e-5.
        recompute_encoder: compute the encoder's layers again on the way back rather than keep all of their
            intermediate results: for images or batches that do not fit into memory otherwise.

    Raises:
        ValueError: a size that cannot be.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        backbone: str = "resnet50",
        backbone_norm: NormKind = "frozen",
        trainable_backbone_layers: int = 3,
        feature_strides: Sequence[int] = (8, 16, 32),
        num_feature_levels: int = 4,
        hidden_dim: int = 256,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 2048,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        num_queries: int = 900,
        num_denoising: int = 100,
        denoising_rule: DenoisingRule = "boxes",
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        denoising_multiple: int = 1,
        query_groups: int = 1,
        dropout: float = 0.0,
        shared_heads: bool = True,
        position_temperature: float = IMAGE_TEMPERATURE,
        position_offset: float = 0.0,
        box_epsilon: float = 1e-3,
        recompute_encoder: bool = False,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: a detector needs at least one class.")
        if hidden_dim % 4:
            raise ValueError(f"hidden_dim={hidden_dim} is not a multiple of 4.")
        if min(num_decoder_layers, num_queries, denoising_multiple, query_groups) < 1:
            raise ValueError("num_decoder_layers, num_queries, denoising_multiple and query_groups must be at least 1.")
        self.num_classes = num_classes
        if num_denoising < 0:
            raise ValueError(f"num_denoising={num_denoising}: give a number of boxes, or 0 for none.")
        if denoising_rule not in get_args(DenoisingRule):
            raise ValueError(f"denoising_rule={denoising_rule!r}: choose one of {', '.join(get_args(DenoisingRule))}.")
        self.num_denoising, self.denoising_rule = num_denoising, denoising_rule
        self.label_noise_ratio, self.box_noise_scale = label_noise_ratio, box_noise_scale
        self.denoising_multiple = denoising_multiple
        self.position = {"temperature": position_temperature, "offset": position_offset}
        attention = {
            "hidden_dim": hidden_dim,
            "num_levels": num_feature_levels,
            "num_heads": num_heads,
            "num_points": num_points,
            "ffn_dim": ffn_dim,
        }
        # The order of registration is the published parameter order; optimizer states depend on it.
        self.level_embedding = nn.Parameter(torch.empty(num_feature_levels, hidden_dim))
        self.encoder = Encoder(num_layers=num_encoder_layers, dropout=dropout, recompute=recompute_encoder, **attention)
        self.decoder = Decoder(
            num_layers=num_decoder_layers,
            num_classes=num_classes,
            dropout=dropout,
            shared_heads=shared_heads,
            box_epsilon=box_epsilon,
            **attention,
        )
        self.query_selection = QuerySelection(hidden_dim=hidden_dim, num_classes=num_classes, num_queries=num_queries)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_dim)
        body = (TimmBackbone if backbone.startswith(PREFIX) else Backbone)(
            name=backbone,
            strides=feature_strides,
            norm=backbone_norm,
            trainable_layers=trainable_backbone_layers,
        )
        self.neck = Neck(in_channels=body.channels, hidden_dim=hidden_dim, num_levels=num_feature_levels)
        self.backbone = body
        self._unpadded = KeptResult[TokenGeometry]()
        self.query_groups = query_groups
        if query_groups > 1:
            self.group_queries = nn.Embedding((query_groups - 1) * num_queries, hidden_dim)
        self.image_mean: Tensor
        self.image_std: Tensor
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1) * 255, persistent=False)
        further = self.group_queries if query_groups > 1 else None
        start_parameters(self.encoder, self.decoder, self.query_selection, further, self.level_embedding)

    def semantics(self) -> dict[str, float]:
        """The values of the arguments in `PUBLISHED_SEMANTICS`."""
        return {
            "position_temperature": self.position["temperature"],
            "position_offset": self.position["offset"],
            "box_epsilon": self.decoder.box_epsilon,
        }

    def compile_layers(self, backend: Backend = "inductor", *, cuda_graphs: bool = False) -> CompiledLayers:
        """Compile the layers of encoder and decoder at their first use in training; names of parameters stay the same.

        They have many small operations between the large ones; the backbone, made of large ones, gains nothing. Sizes
        take further graphs, with and without padding, until the compiler has those for any size. Where it fails, the
        layers run as they are, and a warning says why.

        Args:
            backend: of `torch.compile`.
            cuda_graphs: replay each layer as a CUDA graph, see `CompiledLayers` for what a training loop has to do
                then.

        Returns:
            The compiled layers, which know whether the compiler has failed.
        """
        if self.level_embedding.device.type == "cpu":
            for module in self.modules():
                if isinstance(module, MultiScaleDeformableAttention):
                    module.keep_sampling_out_of_compilation()
        layers = (*self.encoder.layers, *self.decoder.layers)
        # the gradients of the backbone come from operations that no graph has
        others = [parameter for name, parameter in self.named_parameters() if not name.startswith("backbone.")]
        return CompiledLayers(layers, backend, cuda_graphs=cuda_graphs, parameters=others)

    def forward(self, batch: Batch, noise: Noise | None = None) -> ModelOutput:
        """Class logits and boxes of all decoder layers, of the proposals and of the denoising queries.

        Args:
            batch: images, with targets in training for the denoising queries.
            noise: draws for the denoising queries, to repeat a step exactly; drawn afresh when None.

        Returns:
            What every decoder layer, the encoder and the denoising queries say.

        Raises:
            ValueError: a label that the model has no class for.
        """
        if batch.targets is not None and batch.targets.highest_label >= self.num_classes:
            raise ValueError(
                f"A batch with image ids {list(batch.image_ids)} has label {batch.targets.highest_label}; the model "
                f"has {self.num_classes} classes, so labels go from 0 to {self.num_classes - 1}."
            )
        levels = self.feature_maps(batch.images)
        return self.detect(levels, self.prepare(batch, levels, noise))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> L maps (B, D, h, w), finest first. The device alone works, as in `detect`."""
        levels: list[Tensor] = self.neck(self.backbone(self.normalize(images)))
        return levels

    def prepare(self, batch: Batch, levels: Sequence[Tensor], noise: Noise | None = None) -> PreparedInputs:
        """All that the host has to say about a batch: sizes, numbers of boxes and draws.

        Args:
            batch: as in `forward`.
            levels: of which the shapes count.
            noise: as in `forward`.
        """
        shapes = tuple((int(level.shape[2]), int(level.shape[3])) for level in levels)
        geometry = geometry_of(batch, shapes, self._unpadded, dim=self.level_embedding.shape[1], **self.position)
        targets = batch.targets
        if not self.training or targets is None or not self.num_denoising or not max(targets.num_boxes, default=0):
            return PreparedInputs(geometry)
        if noise is None:
            groups = num_denoising_groups(self.num_denoising, max(targets.num_boxes), self.denoising_rule)
            noise = draw_noise(targets, num_groups=groups, num_classes=self.num_classes)
        return PreparedInputs(geometry, targets, noise)

    def detect(self, levels: Sequence[Tensor], prepared: PreparedInputs) -> ModelOutput:
        """From feature maps to the output. The device alone works: no copy from or to the host, no synchronisation.

        Nor does any shape depend on the values of a tensor, so that the same launches serve other batches of the same
        shapes and numbers.

        Args:
            levels: of `feature_maps`.
            prepared: of `prepare`.
        """
        geometry = prepared.geometry
        tokens, position = flatten_levels(levels, geometry, self.level_embedding)
        memory = self.encoder(tokens, position, geometry, self.level_embedding)
        selected = self.query_selection(memory, geometry)

        queries, reference_logits, attention_mask = selected.content, selected.reference_logits, None
        count, groups = queries.shape[1], self.query_groups if self.training else 1
        if groups > 1:
            further = self.group_queries.weight.view(groups - 1, -1, queries.shape[2])[:, :count].flatten(0, 1)
            queries = torch.cat((queries, further.expand(len(queries), -1, -1)), dim=1)
            reference_logits = reference_logits.repeat(1, groups, 1)
        denoising = self._denoising_queries(prepared)
        if denoising is not None or groups > 1:
            attention_mask = denoising_attention_mask(
                num_groups=0 if denoising is None else denoising.num_groups,
                max_boxes=0 if denoising is None else denoising.max_boxes,
                num_queries=count,
                num_unused=0 if denoising is None else denoising.num_unused,
                num_query_groups=groups,
                device=queries.device,
            )
        if denoising is not None:
            queries = torch.cat((denoising.content, queries), dim=1)
            reference_logits = torch.cat((denoising.reference_logits, reference_logits), dim=1)
        hidden, boxes = self.decoder(queries, reference_logits, memory, geometry, attention_mask)
        # The label embedding takes part even when no image has boxes, so that plain DDP finds no unused parameter.
        hidden = hidden + 0.0 * self.label_embedding.weight[0, 0]
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            logits = self.decoder.class_logits(hidden.float())  # bfloat16 scores would be full of ties
        first = 0 if denoising is None else denoising.reference_logits.shape[1]
        slots = 0 if denoising is None else first - denoising.num_unused
        return ModelOutput(
            pred_logits=logits[:, :, first : first + count],
            pred_boxes=boxes[:, :, first : first + count],
            encoder_logits=selected.logits,
            encoder_boxes=selected.boxes_cxcywh,
            denoising=None
            if denoising is None
            else DenoisingOutput(
                pred_logits=logits[:, :, :slots],
                pred_boxes=boxes[:, :, :slots],
                num_groups=denoising.num_groups,
                max_boxes=denoising.max_boxes,
            ),
            group_logits=None if groups == 1 else _by_group(logits[:, :, first + count :], count),
            group_boxes=None if groups == 1 else _by_group(boxes[:, :, first + count :], count),
        )

    def normalize(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 pixels -> float32 with ImageNet's mean and deviation; floating point passes unchanged."""
        if images.dtype != torch.uint8:
            return images
        return (images.float() - self.image_mean) / self.image_std

    def _denoising_queries(self, prepared: PreparedInputs) -> DenoisingQueries | None:
        if prepared.targets is None or prepared.noise is None:
            return None
        return denoising_queries(
            prepared.targets,
            prepared.noise,
            self.label_embedding,
            label_noise_ratio=self.label_noise_ratio,
            box_noise_scale=self.box_noise_scale,
            multiple=self.denoising_multiple,
        )


def _by_group(values: Tensor, count: int) -> Tensor:
    """(L, B, G * Q, X) -> (L * G, B, Q, X)."""
    layers, batch, _, size = values.shape
    return values.reshape(layers, batch, -1, count, size).transpose(1, 2).flatten(0, 1)


def flatten_levels(levels: Sequence[Tensor], geometry: TokenGeometry, level_embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Lay all feature levels end to end, from the finest to the coarsest.

    Args:
        levels: L maps (B, D, H, W).
        geometry: where their cells lie, with their positions.
        level_embedding: (L, D), added to the positions so that a token knows its level (arXiv 2010.04159, A.4).

    Returns:
        Tokens (B, S, D) and their positions, (B, S, D), or (1, S, D) where they are those of all images.
    """
    assert geometry.position is not None
    tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    of_tokens = [
        embedding.expand(height * width, -1)
        for (height, width), embedding in zip(geometry.spatial_shapes, level_embedding, strict=True)
    ]
    return tokens, geometry.position + torch.cat(of_tokens)
