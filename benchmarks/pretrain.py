"""Make weights that know floor plans from drawn ones alone: `python -m benchmarks pretrain --output rooms_small.pt`.

Two runs of `fit`: a long one on small pages at a constant rate, and a short one on larger pages whose rate falls to
zero; with `--weights` the second alone, from weights that were made before. Both can be stopped and continue where they
were when the command is given again. Options of `fit` may follow. 240 drawn plans serve as the "images" of the dataset,
and 60 others to measure; every other plan is seen once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dino_lightning.__main__ import run
from dino_lightning.floor_plans import write_rooms_dataset
from dino_lightning.weights.shipped import write_for_shipping

SEED = 7  # of the plans on file; the weights' and the drawn plans' own seed is --seed


def fit(folder: Path, options: list[str]) -> Path:
    """Run or continue a training run; returns its best checkpoint."""
    last = folder / "checkpoints" / "last.ckpt"
    started = ["--ckpt_path", str(last)] if last.exists() else []
    code = run(["fit", *options, "--run_dir", str(folder), *started])
    if code:
        raise SystemExit(code)
    return folder / "checkpoints" / "best.ckpt"


def main() -> None:
    """Train, write the weights and print their checksum."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks pretrain", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="the file of weights")
    add("--folder", type=Path, default=Path("runs/pretrain"), help="of the two runs")
    add("--config", default="configs/rooms_small.yaml")
    add("--long_epochs", type=int, default=100, help="of 1,200 plans each, at the config's size")
    add("--short_epochs", type=int, default=8, help="the same, at --size")
    add("--size", type=int, default=416, help="side of the larger pages in pixels")
    add("--weights", help="name or file to start the short run from, instead of the long one")
    add("--seed", type=int, default=1)
    options, more = parser.parse_known_args()
    plans = write_rooms_dataset(options.folder / "plans", num_train=240, num_val=60, style="realistic", seed=SEED)
    common = ["--data.root", str(plans), "--seed_everything", str(options.seed), *more]
    first = options.weights
    if first is None:
        average = ["--ema_decay", "0.999", "--ema_tau", "500"]
        average += ["--trainer.max_epochs", str(options.long_epochs)]
        first = fit(options.folder / "long", ["--config", options.config, *average, *common])
    second = fit(
        options.folder / "short",
        [
            *["--config", options.config, "--model.weights", str(first), "--model.lr_schedule", "cosine"],
            *["--ema_decay", "0.99", "--ema_tau", "50", "--model.warmup_steps", "20"],
            *["--trainer.max_epochs", str(options.short_epochs), "--data.fixed_size", str(options.size), *common],
        ],
    )
    checkpoint = torch.load(second, map_location="cpu", weights_only=True)
    checksum = write_for_shipping(checkpoint, options.output)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB, SHA-256 {checksum}")


if __name__ == "__main__":
    main()
