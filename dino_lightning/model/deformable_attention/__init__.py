"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4)."""

from dino_lightning.model.deformable_attention.dispatch import implementation_in_use, set_implementation
from dino_lightning.model.deformable_attention.module import MultiScaleDeformableAttention
from dino_lightning.model.deformable_attention.reference import deformable_attention

__all__ = ["MultiScaleDeformableAttention", "deformable_attention", "implementation_in_use", "set_implementation"]
