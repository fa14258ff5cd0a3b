"""The parameters of a detector's transformer before anything has been learned."""

from __future__ import annotations

from torch import Tensor, nn

from dino_lightning.model.decoder import Decoder
from dino_lightning.model.deformable_attention import MultiScaleDeformableAttention
from dino_lightning.model.encoder import Encoder
from dino_lightning.model.query_selection import QuerySelection


def start_parameters(
    encoder: Encoder,
    decoder: Decoder,
    query_selection: QuerySelection,
    group_queries: nn.Embedding | None,
    level_embedding: Tensor,
) -> None:
    """Xavier for the transformer's matrices; heads and deformable attention keep the start they gave themselves."""
    for part in (encoder, decoder.layers, decoder.query_position_head):
        for parameter in part.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
    nn.init.xavier_uniform_(query_selection.content_queries.weight)
    nn.init.xavier_uniform_(query_selection.output_projection.weight)
    if group_queries is not None:
        nn.init.xavier_uniform_(group_queries.weight)
    for module in (*encoder.modules(), *decoder.modules()):
        if isinstance(module, MultiScaleDeformableAttention):
            module.reset_parameters()
    # published: the encoder's heads begin as copies of the decoder's
    for ours, theirs in zip((query_selection.bbox_head, query_selection.class_head), decoder.heads(-1), strict=True):
        ours.load_state_dict(theirs.state_dict())
    nn.init.normal_(level_embedding)
