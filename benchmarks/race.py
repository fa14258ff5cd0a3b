"""Our small config against other detectors on a dataset, for equal minutes: `python -m benchmarks race --data DIR`.

All contestants have the same images in the same sizes, the same augmentation, cores, starting weights of the backbone
(MobileNetV2) and evaluation, and the same minutes of training, in which evaluation does not count. They run one after
another. How many epochs fit into the minutes is estimated from 20 steps of each; the rate drops after 4/5 of them.
At the end each is evaluated once more with the configuration's test-time augmentation, which is the same for all.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.measure import environment, save, table
from benchmarks.torchvision_detectors import Peer, faster_rcnn, ssdlite
from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.callbacks import EMA
from dino_lightning.cli.config_files import absent_config, with_packaged_configs
from dino_lightning.files import save_figure
from dino_lightning.model.backbone import Backbone
from dino_lightning.weights.backbone_loading import start_backbone_from

CONTESTANTS = ("ours", "faster_rcnn", "ssdlite")
PROBED_STEPS, PROBED_SHARE = 25, 0.1  # as many, but not more of the minutes
WARM_UP = 5  # steps of these, which are slower
EVALUATIONS = 8
SHOWN = ("AP", "AP50", "F1")


@dataclass(frozen=True)
class Moment:
    """One evaluation: after how many minutes of training and steps, in how many views, and what came out."""

    minutes: float
    step: int
    views: int
    values: dict[str, float]


class Clock(lightning.Callback):
    """Sums the seconds of training, loading included and evaluation not; stops it when they are over.

    Args:
        limit: in seconds.
        kind: `wall`, or `cpu`: seconds that the process computed, over its threads.
    """

    def __init__(self, limit: float, kind: str) -> None:
        self.limit, self.kind, self.seconds, self.views = limit, kind, 0.0, 1
        self.of_steps: list[float] = []  # seconds of each
        self.moments: list[Moment] = []
        self._since: float | None = None

    def _now(self) -> float:
        return time.perf_counter() if self.kind == "wall" else time.process_time() / torch.get_num_threads()

    def _pause(self) -> None:
        if self._since is not None:
            self.seconds += self._now() - self._since
            self._since = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Run on; the last epoch is evaluated, whichever it is."""
        self._since = self._now() if self._since is None else self._since
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop where the time is over; the evaluation at the end of the epoch follows."""
        before = self.seconds
        self._pause()
        self._since = self._now()
        self.of_steps.append(self.seconds - before)
        if self.seconds >= self.limit:
            trainer.should_stop = True
            trainer.check_val_every_n_epoch = 1  # whichever epoch this is

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Stand still."""
        self._pause()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note what came out."""
        values = {name: float(trainer.callback_metrics[f"val/{name}"]) for name in SHOWN}
        self.moments.append(Moment(self.seconds / 60, trainer.global_step, self.views, values))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        views = f", {self.views} views" if self.views > 1 else ""
        print(f"  {self.seconds / 60:5.1f} min, step {trainer.global_step}{views}: {shown}", flush=True)


def contestant(
    name: str, data: CocoDataModule, epochs: int, options: argparse.Namespace
) -> tuple[lightning.LightningModule, list[lightning.Callback], dict[str, Any]]:
    """The module of that name, its callbacks, and options of its Trainer."""
    model = {**options.settings["model"], "backbone_weights": options.backbone_weights, "tta_views": options.tta_views}
    if name == "ours":
        own = {"weights": options.weights, "weights_for_rooms": options.weights_for_rooms, "recipe": "auto"}
        module = DINOModule(num_classes=data.num_classes, **{**model, **own})
        return module, [EMA(decay=None)], {}
    body = Backbone(
        name=model.get("backbone", "resnet50"),  # as DINO has it by default, also below
        strides=(8, 16, 32),
        norm=model.get("backbone_norm", "frozen"),
        trainable_layers=model.get("trainable_backbone_layers", 3),
    )
    if options.backbone_weights is not None:
        holder = DINOModule(num_classes=data.num_classes, **model)
        start_backbone_from(holder.model, options.backbone_weights)
        body.load_state_dict(holder.model.backbone.state_dict())
    side = data.stretch_to or data.image_size
    detector = (faster_rcnn if name == "faster_rcnn" else ssdlite)(body, data.num_classes, side)
    return Peer(detector, epochs, options.tta_views), [], {"gradient_clip_val": 10.0}


def race(name: str, options: argparse.Namespace) -> list[Moment]:
    """Train one contestant for the minutes; what each evaluation said.

    Args:
        name: of `CONTESTANTS`.
        options: those of the command line; `settings`, a configuration's; `weights_for_rooms`; `evaluations`, how many
            there are in the minutes; and `tta_views`, in how many views it is evaluated once more at the end.
    """
    lightning.seed_everything(options.seed, verbose=False)
    config = options.settings

    def fit(epochs: int, clock: Clock, **more: Any) -> None:
        data = CocoDataModule(root=str(options.data), **{**config["data"], "num_workers": 0})
        module, callbacks, arguments = contestant(name, data, epochs, options)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            accelerator="cpu",
            callbacks=[*callbacks, clock],
            **arguments,
            **more,
        )
        trainer.fit(module, data)
        if options.tta_views > 1 and clock.moments:  # of which the probe has none
            clock.views = options.tta_views
            trainer.validate(module, data, verbose=False)

    limit = options.minutes * 60
    probe = Clock(limit * PROBED_SHARE, options.clock)
    fit(1, probe, limit_train_batches=PROBED_STEPS, limit_val_batches=0)
    data = CocoDataModule(root=str(options.data), **config["data"])
    in_epoch = max(data.images_per_epoch // data.batch_size, 1)
    steps = limit / statistics.mean(probe.of_steps[WARM_UP:] or probe.of_steps)
    epochs = math.ceil(steps / in_epoch)
    print(f"{name}: {steps:.0f} steps, {steps / in_epoch:.1f} epochs in {options.minutes:g} minutes", flush=True)
    clock = Clock(limit, options.clock)
    # a little less than all images in each epoch, so that whole epochs fill the minutes: rates and averages follow them
    part = min(in_epoch, max(1, round(steps / epochs)))
    fit(epochs, clock, check_val_every_n_epoch=max(1, epochs // options.evaluations), limit_train_batches=part)
    return clock.moments


def draw(results: dict[str, list[Moment]], path: Path) -> None:
    """AP, AP50 and F1 over the minutes, one panel each."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, metric in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for name, moments in results.items():
            single = [moment for moment in moments if moment.views == 1]
            values = [moment.values[metric] for moment in single]
            (line,) = axes.plot([moment.minutes for moment in single], values, marker="o", markersize=3, label=name)
            for moment in (each for each in moments if each.views > 1):
                place, label = (moment.minutes, moment.values[metric]), f"{name}, {moment.views} views"
                axes.plot(*place, marker="*", markersize=9, linestyle="", color=line.get_color(), label=label)
        axes.set(title=metric, xlabel="minutes of training", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    save_figure(figure, path)


def main() -> None:
    """Run the race, print a table and draw a picture; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks race", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a COCO-format dataset")
    add("--minutes", type=float, default=30.0, help="of training for each contestant")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time over threads, for a busy machine")
    add("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    add(
        "--config",
        default="small_cpu.yaml",
        help="ours, a file or one that is shipped; the sizes, augmentation and batches of all",
    )
    add("--backbone_weights", help="file or torchvision name; random if left out")
    add("--weights", help="starting weights of our whole detector")
    add("--seed", type=int, default=0)
    add("--picture", type=Path, default=Path("race.png"))
    add("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    config = Path(with_packaged_configs(["--config", options.config])[1])
    if not config.is_file():
        parser.error(absent_config(options.config))
    options.settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    options.weights_for_rooms, options.evaluations = None, EVALUATIONS
    options.tta_views = options.settings["model"].get("tta_views", 1)
    results: dict[str, list[Moment]] = {}
    for name in options.contestants:
        results[name] = race(name, options)
        draw(results, options.picture)  # after each: a race takes long
        if options.output is not None:
            rows = {key: [vars(moment) for moment in moments] for key, moments in results.items()}
            save(options.output, {"environment": environment(), "results": rows})
    rows_shown: list[tuple[str, ...]] = [("contestant", "minutes", "steps", "views", *SHOWN)]
    for name, moments in results.items():
        rows_shown += [
            (name, f"{m.minutes:.1f}", str(m.step), str(m.views), *(f"{m.values[metric]:.3f}" for metric in SHOWN))
            for m in moments
        ]
    print(table(rows_shown))
    print(f"picture: {options.picture}")


if __name__ == "__main__":
    main()
