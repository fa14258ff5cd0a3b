"""What `fit`, `validate` and `test` say and write at the end: the files of a run, metrics, classes, the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dino_lightning.cli.command import writing
from dino_lightning.console import say
from dino_lightning.data import CocoDataModule
from dino_lightning.metrics import ClassResult
from dino_lightning.model import deformable_attention, residual_norm
from dino_lightning.report import Source, as_text, write_report
from dino_lightning.training.module import DINOModule


def show_places(run_dir: Path, curves: Path, program: str) -> None:
    """Print where the files of a training are, and the commands that look at them.

    Args:
        run_dir: of the run.
        curves: the picture of its learning curves.
        program: what runs the commands.
    """
    checkpoints = run_dir / "checkpoints"
    places = [
        ("best checkpoint", checkpoints / "best.ckpt"),
        ("last checkpoint", checkpoints / "last.ckpt"),
        ("metrics", run_dir / "metrics.csv"),
        ("learning curves", curves),
        ("detections", run_dir / "detections.png"),
        ("configuration", run_dir / "config.yaml"),
        ("record", run_dir / "run.json"),
    ]
    for name, path in places:
        if path.exists():
            say(f"{name:<16} {path}")
    if (checkpoints / "best.ckpt").exists():
        say(f"\nLook closer:  {program} validate --ckpt_path {checkpoints / 'best.ckpt'}")
    if (run_dir / "tensorboard").is_dir():
        say(f"Watch losses: tensorboard --logdir {run_dir}")


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """Three metrics a line, in place of Lightning's table; those of single classes are left out.

    Args:
        metrics: numbers by name; -1 stands for nothing to measure and is shown as a dash.
    """
    names = [name for name in metrics if name.partition("/dataloader_idx_")[0].count("/") == 1]
    width = max((18, *(len(name) + 1 for name in names)))
    cells = [
        f"{name:<{width}}{'-' if float(metrics[name]) == -1 else f'{float(metrics[name]):.3f}':>6}" for name in names
    ]
    return "\n".join("  ".join(cells[start : start + 3]) for start in range(0, len(cells), 3))


def show_classes(rows: Sequence[ClassResult]) -> None:
    """Print the results of the classes, a line each."""
    width = min(24, max(8, *(len(row.name) + 1 for row in rows))) if rows else 8
    say(f"{'class':<{width}}{'boxes':>8}{'AP':>8}{'AP50':>8}{'F1':>8}{'precision':>11}{'recall':>8}{'threshold':>11}")
    for row in rows:
        say(
            f"{row.name[: width - 1]:<{width}}{row.num_boxes:>8}{row.ap:>8.3f}{row.ap50:>8.3f}{row.f1:>8.3f}"
            f"{row.precision:>11.3f}{row.recall:>8.3f}{row.threshold:>11.3f}"
        )


def save_report(
    module: DINOModule,
    data: CocoDataModule,
    subcommand: str,
    checkpoint: str,
    run_dir: Path,
    *,
    against: tuple[str, dict[str, Any]] | None,
) -> None:
    """Write the report of an evaluation; on the first process, as it alone has seen all images.

    Args:
        module: with the evaluation.
        data: what it was evaluated on.
        subcommand: `validate` or `test`.
        checkpoint: the file that was evaluated; empty for other weights.
        run_dir: the folder of the evaluation.
        against: path and content of another report to compare with.

    Raises:
        UsageError: the folder cannot be written.
    """
    if module.evaluation is None:
        return
    dataset = data.test_set if subcommand == "test" and data.test_set is not None else data.val_set
    folder = run_dir / "report"
    device = module.trainer.strategy.root_device
    source = Source(
        subcommand,
        dataset.annotations,
        data.category_ids,
        checkpoint,
        deformable_attention=deformable_attention.implementation_in_use(device),
        residual_norm=residual_norm.implementation_in_use(device),
        tta_views=module.hparams["tta_views"],
    )
    with writing(folder, "--run_dir"):
        summary = write_report(
            module.evaluation,
            source,
            folder,
            threshold=module.score_threshold,
            against=against,
        )
    say(f"\n{as_text(summary)}\nreport           {folder / 'index.html'}")
