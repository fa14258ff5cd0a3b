"""Seconds to an AP50 of 0.85 on drawn floor plans, from random weights: `python -m benchmarks converge`.

Model and data are the demo's. Only the time in training counts, not that in evaluation. One run for each seed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import yaml

from benchmarks.measure import environment, save, table
from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.cli.config_files import config_path
from dino_lightning.floor_plans import write_rooms_dataset

GOAL = 0.85


class Stopwatch(lightning.Callback):
    """Sums the time spent in training batches, and stops training at the goal."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.history: list[tuple[float, float]] = []
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start timing the batch."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the time of the batch."""
        self.seconds += time.perf_counter() - self._start

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Record the time and AP50; stop at the goal."""
        if not trainer.sanity_checking:
            self.history.append((self.seconds, float(trainer.callback_metrics["val/AP50"])))
            trainer.should_stop = self.history[-1][1] >= GOAL


def run(seed: int, root: Path) -> list[tuple[float, float]]:
    """Seconds and AP50 at each evaluation."""
    config = yaml.safe_load(config_path("rooms_demo.yaml").read_text(encoding="utf-8"))
    lightning.seed_everything(seed, verbose=False)
    data = CocoDataModule(root=str(root), **config["data"])
    module = DINOModule(num_classes=data.num_classes, **config["model"])
    watch = Stopwatch()
    lightning.Trainer(
        **config["trainer"],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[watch],
    ).fit(module, data)
    return watch.history


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks converge", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = write_rooms_dataset(Path(folder) / "rooms", num_train=240, num_val=60, style="clean", seed=0)
        histories = {seed: run(seed, root) for seed in options.seeds}
    rows = [("seed", f"seconds to AP50 {GOAL}", "AP50 then", "before")]
    for seed, history in histories.items():
        seconds, reached = history[-1]
        earlier = ", ".join(f"{value:.2f} at {when:.0f} s" for when, value in history[:-1])
        rows.append((str(seed), f"{seconds:.0f}" if reached >= GOAL else "not reached", f"{reached:.3f}", earlier))
    print(table(rows))
    if options.output is not None:
        save(options.output, {"environment": environment(), "results": histories})


if __name__ == "__main__":
    main()
