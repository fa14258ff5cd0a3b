"""Lightning callbacks that show what a run does."""

from dino_lightning.callbacks.kept_metrics import KeptMetrics
from dino_lightning.callbacks.prediction_images import PredictionImages
from dino_lightning.callbacks.report import RunReport

__all__ = ["KeptMetrics", "PredictionImages", "RunReport"]
