"""Synthetic floor plans drawn from a seed: `layout` and `house` divide a floor into rooms, the other files draw it."""

from dino_lightning.floor_plans.dataset import Style, draw_plan, write_rooms_dataset
from dino_lightning.floor_plans.drawing import Room

__all__ = ["Room", "Style", "draw_plan", "write_rooms_dataset"]
