"""Lightning callbacks: saving and resuming, averaged weights, batch sizes, and what a run shows."""

from dino_lightning.callbacks.auto_batch_size import AutoBatchSize
from dino_lightning.callbacks.best import BestCheckpoint, EarlyStop
from dino_lightning.callbacks.device_settings import DeviceSettings
from dino_lightning.callbacks.ema import EMA
from dino_lightning.callbacks.learning_curves import LearningCurves
from dino_lightning.callbacks.metrics_csv import MetricsCsvResume
from dino_lightning.callbacks.out_of_memory import OutOfMemoryReporter
from dino_lightning.callbacks.prediction_images import PredictionImages
from dino_lightning.callbacks.progress import Progress
from dino_lightning.callbacks.rank_watchdog import WatchProcesses
from dino_lightning.callbacks.record import RunRecord, SavedConfig
from dino_lightning.callbacks.saving import AtomicCheckpointIO, GracefulCheckpoint, StoppedOnRequest

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "AutoBatchSize",
    "BestCheckpoint",
    "DeviceSettings",
    "EarlyStop",
    "GracefulCheckpoint",
    "LearningCurves",
    "MetricsCsvResume",
    "OutOfMemoryReporter",
    "PredictionImages",
    "Progress",
    "RunRecord",
    "SavedConfig",
    "StoppedOnRequest",
    "WatchProcesses",
]
