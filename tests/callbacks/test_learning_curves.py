"""The table and the picture of the learning curves: which epoch is the best, and what is plotted."""

from types import SimpleNamespace

import pytest

from dino_lightning.callbacks import LearningCurves
from dino_lightning.callbacks.learning_curves import draw_curves

VALIDATED = {"val/loss": 9.0, "val/AP": 0.1, "val/AP50": 0.3, "val/AP75": 0.05, "val/F1": 0.4}
AT_THE_BEST = {"val/F1_precision": 0.5, "val/F1_recall": 0.3, "val/F1_threshold": 0.25}


def row(epoch, **changes):
    return {"epoch": float(epoch), "train/loss": 20.0 / epoch, **changes}


def validated(epoch, ap):
    return row(epoch, **{**VALIDATED, **AT_THE_BEST, "val/AP": ap})


def starred(curves):
    return [
        int(line.split()[1]) for line in curves.table().splitlines() if line.startswith("* ") and "best" not in line
    ]


@pytest.mark.parametrize(
    ("history", "best"),
    [
        ([row(1), row(2)], []),
        ([row(1), validated(2, 0.0), row(3)], [2]),
        ([row(1), validated(2, -1.0), row(3)], [2]),
        ([validated(1, 0.3), row(2), validated(3, 0.1), row(4), row(5), row(6)], [1]),
        ([validated(1, 0.2), validated(2, 0.2)], [1]),  # as ModelCheckpoint keeps the first of two equal ones
    ],
)
def test_the_star_marks_the_best_epoch_that_was_validated(history, best, tmp_path):
    curves = LearningCurves(directory=str(tmp_path))
    curves.load_state_dict({"history": history})
    assert starred(curves) == best
    assert ("best epoch by val/AP: F1" in curves.table()) == bool(best)


def test_a_resumed_run_does_not_repeat_the_validation_before_it(tmp_path):
    trainer = SimpleNamespace(
        callback_metrics={**VALIDATED, **AT_THE_BEST}, current_epoch=0, is_global_zero=True, sanity_checking=False
    )
    module = SimpleNamespace(epoch_loss=12.0)
    first = LearningCurves(directory=str(tmp_path))
    first.on_validation_end(trainer, module)
    first.on_train_epoch_end(trainer, module)
    resumed = LearningCurves(directory=str(tmp_path))
    resumed.load_state_dict(first.state_dict())
    trainer.current_epoch, trainer.sanity_checking = 1, True
    resumed.on_validation_end(trainer, module)
    resumed.on_train_epoch_end(trainer, module)
    assert [line["epoch"] for line in resumed.history] == [1, 2]
    assert "val/AP" in resumed.history[0] and "val/AP" not in resumed.history[1]
    assert starred(resumed) == [1]
    assert resumed.curves_path.read_bytes().startswith(b"\x89PNG")


def test_a_panel_appears_only_with_something_to_show():
    assert draw_curves([{"epoch": 1.0}], denoising=True) is None
    (losses,) = draw_curves([row(1)], denoising=True).axes
    assert losses.get_title() == "loss"
    losses, metrics = draw_curves([row(1), row(2, **VALIDATED)], denoising=True).axes
    low, high = metrics.get_ylim()
    assert low == 0 and 1 < high < 1.1  # a line at 1 is not on the edge
    assert losses.get_xlim() == metrics.get_xlim()
    nothing_to_measure = dict.fromkeys(VALIDATED, -1.0)
    assert len(draw_curves([row(1, **nothing_to_measure)], denoising=True).axes) == 1


@pytest.mark.parametrize("epochs", [1, 2, 3, 14, 300])
def test_ticks_are_whole_epochs(epochs):
    figure = draw_curves([row(epoch, **VALIDATED) for epoch in range(1, epochs + 1)], denoising=True)
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)


def test_lines_of_equal_values_are_told_apart():
    _, metrics = draw_curves([row(epoch, **dict.fromkeys(VALIDATED, 1.0)) for epoch in (1, 2)], denoising=True).axes
    widths = [line.get_linewidth() for line in metrics.get_lines()]
    assert len(widths) > 1 and widths == sorted(set(widths), reverse=True)  # each lies in the one below it
    assert all(text.get_text().endswith(": 1.000") for text in metrics.get_legend().get_texts())


@pytest.mark.parametrize("denoising", [True, False])
def test_the_legend_says_what_the_losses_include(denoising):
    figure = draw_curves([row(1, **VALIDATED)], denoising=denoising)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert all(("denoising queries" in name) == denoising for name in names)
