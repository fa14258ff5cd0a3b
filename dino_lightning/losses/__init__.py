"""Matching and losses: plain `nn.Module`s that run without Lightning."""

from dino_lightning.errors import NonFiniteError
from dino_lightning.losses.criterion import Criterion, mean_num_boxes
from dino_lightning.losses.matcher import HungarianMatcher, Matches

__all__ = ["Criterion", "HungarianMatcher", "Matches", "NonFiniteError", "mean_num_boxes"]
