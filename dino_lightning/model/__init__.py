"""The detector: plain `nn.Module`s that run without Lightning."""

from dino_lightning.model.dino import DINO
from dino_lightning.model.postprocess import postprocess

__all__ = ["DINO", "postprocess"]
