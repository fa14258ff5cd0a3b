"""The demo's accuracy for several seeds, and the seconds that it trains: `python -m benchmarks converge`.

Model, data and steps are the demo's, its average of the weights included. Only the time in training counts, not that in
evaluation.
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
from dino_lightning.callbacks import EMA
from dino_lightning.cli.config_files import config_path
from dino_lightning.floor_plans import write_rooms_dataset

SHOWN = ("AP", "AP50", "F1")


class Stopwatch(lightning.Callback):
    """Sums the time spent in training batches."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start timing the batch."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the time of the batch."""
        self.seconds += time.perf_counter() - self._start


def run(seed: int, root: Path) -> dict[str, float]:
    """Seconds of training, and the metrics after it."""
    config = yaml.safe_load(config_path("rooms_demo.yaml").read_text(encoding="utf-8"))
    lightning.seed_everything(seed, verbose=False)
    data = CocoDataModule(root=str(root), **config["data"])
    module = DINOModule(num_classes=data.num_classes, **config["model"])
    watch = Stopwatch()
    trainer = lightning.Trainer(
        **config["trainer"],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[EMA(decay=None), watch],
    )
    trainer.fit(module, data)
    return {"seconds": watch.seconds, **{name: float(trainer.callback_metrics[f"val/{name}"]) for name in SHOWN}}


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks converge", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = write_rooms_dataset(Path(folder) / "rooms", num_train=240, num_val=60, style="clean", seed=0)
        found = {seed: run(seed, root) for seed in options.seeds}
    rows: list[tuple[str, ...]] = [("seed", "seconds of training", *SHOWN)]
    for seed, values in found.items():
        rows.append((str(seed), f"{values['seconds']:.0f}", *(f"{values[name]:.3f}" for name in SHOWN)))
    print(table(rows))
    if options.output is not None:
        save(options.output, {"environment": environment(), "results": found})


if __name__ == "__main__":
    main()
