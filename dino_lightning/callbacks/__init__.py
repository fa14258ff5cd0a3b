"""Lightning callbacks that show what a run does, and keep it from being lost."""

from dino_lightning.callbacks.auto_batch_size import AutoBatchSize
from dino_lightning.callbacks.ema import EMA
from dino_lightning.callbacks.kept_metrics import KeptMetrics
from dino_lightning.callbacks.learning_curves import RunReport
from dino_lightning.callbacks.out_of_memory import MemoryWatch
from dino_lightning.callbacks.prediction_images import PredictionImages
from dino_lightning.callbacks.processes import WatchProcesses
from dino_lightning.callbacks.progress import Progress
from dino_lightning.callbacks.record import RunRecord, SavedConfig
from dino_lightning.callbacks.saving import SaveAndStop, StoppedOnRequest, WholeCheckpoints

__all__ = [
    "EMA",
    "AutoBatchSize",
    "KeptMetrics",
    "MemoryWatch",
    "PredictionImages",
    "Progress",
    "RunRecord",
    "RunReport",
    "SaveAndStop",
    "SavedConfig",
    "StoppedOnRequest",
    "WatchProcesses",
    "WholeCheckpoints",
]
