"""Which recipe a run follows, and what `fit` says of it."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dino_lightning import DINOModule
from dino_lightning.__main__ import run
from dino_lightning.training.recipe import (
    PUBLISHED,
    SHORT_RUN,
    TOO_FEW_STEPS,
    advice_on_few_steps,
    average_decay,
    choose_recipe,
    planned_steps,
    warn_of_other_recipe,
)
from tests.conftest import TINY_ARGS

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"num_classes": 1, "backbone": "resnet10", "hidden_dim": 16, "num_heads": 2, "num_encoder_layers": 1,
         "num_decoder_layers": 1, "ffn_dim": 16, "num_queries": 5, "backbone_weights": None}  # fmt: skip


def test_without_a_choice_a_module_trains_as_published():
    module = DINOModule(**SMALL)
    assert module.recipe == PUBLISHED
    assert module.criterion.class_loss == "focal" and module.criterion.weights["loss_class"] == 1.0
    assert module.model.box_noise_scale == 1.0


def test_a_resumed_run_that_changes_its_recipe_says_so(recwarn):
    for name, before, now in (("auto", None, 20_000), ("auto", 900, 1_000), ("short", 900, 20_000)):
        warn_of_other_recipe(name, before, now)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"planned to have 900 steps, by the recipe short; it goes on by"):
        warn_of_other_recipe("auto", 900, 20_000)
    with pytest.warns(UserWarning, match=r"--model\.recipe published keeps them"):
        warn_of_other_recipe("auto", 20_000, 900)


def test_what_is_given_wins_over_the_recipe():
    module = DINOModule(**SMALL, recipe="short", box_noise_scale=0.7, class_loss="varifocal")
    assert (module.recipe.class_loss, module.recipe.class_loss_weight) == ("varifocal", 2.0)
    assert module.recipe.clip_grad_norm == 1.0
    assert module.model.box_noise_scale == 0.7
    assert module.criterion.class_loss == "varifocal"


def test_losses_and_costs_have_the_weights_that_are_given():
    published, given = DINOModule(**SMALL), DINOModule(**SMALL, bbox_loss_weight=3, giou_loss_weight=0, cost_giou=7.0)
    assert published.criterion.weights == {"loss_class": 1.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    assert given.criterion.weights == {"loss_class": 1.0, "loss_bbox": 3, "loss_giou": 0}
    costs = [
        (it.cost_class, it.cost_bbox, it.cost_giou) for it in (published.criterion.matcher, given.criterion.matcher)
    ]
    assert costs == [(2.0, 5.0, 2.0), (2.0, 5.0, 7.0)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cost_class": -1.0}, "cost_class=-1.0: a weight must be a number from 0 up"),
        ({"cost_bbox": float("nan")}, "cost_bbox=nan: "),
        ({"giou_loss_weight": float("inf")}, "giou_loss_weight=inf: "),
        ({"class_loss_weight": -0.5, "recipe": "short"}, "class_loss_weight=-0.5: a weight must be a number from 0 up"),
        ({"cost_class": 0, "cost_bbox": 0, "cost_giou": 0}, "cost_class, cost_bbox, cost_giou are all 0"),
        (
            {"class_loss_weight": 0, "bbox_loss_weight": 0, "giou_loss_weight": 0},
            "class_loss_weight, bbox_loss_weight, giou_loss_weight are all 0",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_impossible_weights_are_refused_by_the_name_of_the_option(rooms, tmp_path, capsys, options, message):
    with pytest.raises(ValueError, match=message):
        DINOModule(**SMALL, **options)
    if "cost_class" in options:
        args = [f"--model.{name}={value}" for name, value in options.items()]
        assert run(["fit", "--data.root", str(rooms), *TINY_ARGS, *args, "--run_dir", str(tmp_path)]) != 0
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "short"), [(SHORT_RUN - 1, True), (SHORT_RUN, False), (None, False)])
def test_auto_follows_the_number_of_steps(steps, short):
    assert (choose_recipe("auto", steps) != PUBLISHED) == short


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="recipe is 'best'; choose published, short or auto"):
        DINOModule(**SMALL, recipe="best")


def test_warm_up_and_average_grow_with_the_run():
    assert choose_recipe("auto", 100).warmup_steps < choose_recipe("auto", 1000).warmup_steps
    decays = [average_decay(steps)[0] for steps in (10, 100, 1000, 10_000)]
    assert decays == sorted(decays) and decays[0] > 0 and decays[-1] < 1
    assert average_decay(900)[0] == pytest.approx(1 - 1 / 180)


def trainer(**changes):
    return SimpleNamespace(
        **{"max_epochs": 3, "max_steps": -1, "world_size": 1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0}
        | changes
    )


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 30),  # 43 images in batches of 4: the last, smaller one is dropped
        ({"world_size": 2}, 15),
        ({"accumulate_grad_batches": 4}, 9),
        ({"limit_train_batches": 6}, 18),
        ({"limit_train_batches": 0.5}, 15),
        ({"max_steps": 7}, 7),
        ({"max_epochs": -1}, None),
    ],
)
def test_steps_of_a_run(changes, steps):
    assert planned_steps(trainer(**changes), SimpleNamespace(images_per_epoch=43, batch_size=4)) == steps


def test_few_steps_come_with_the_epochs_that_are_enough():
    assert advice_on_few_steps(TOO_FEW_STEPS, 10) is None
    assert "--trainer.max_epochs 60 " in advice_on_few_steps(100, 10)
    assert "--trainer.max_steps 600 or more" in advice_on_few_steps(100, 10, limited=True)


def test_fit_says_how_long_it_is_which_recipe_follows_and_what_is_wrong(rooms, tmp_path, capsys):
    args = ["fit", "--config", str(CONFIGS / "rooms_demo.yaml"), "--data.root", str(rooms), "--run_dir", str(tmp_path)]
    args += ["--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"]
    args += ["--model.weights_for_rooms", "null", "--model.num_queries", "20"]
    assert run([*args, "--trainer.log_every_n_steps", "1"]) == 0
    said = capsys.readouterr().out
    assert " x 1 epochs: " in said and "Recipe: short (fewer than 10,000 steps): quality_focal" in said
    assert " steps are few for this kind of detector" in said
    assert "Last epoch: errors at a score of " in said and "try this: " in said
    with (tmp_path / "metrics.csv").open() as file:
        assert any(row["train/loss_step"] for row in csv.DictReader(file))
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert "raw_state_dict" in checkpoint  # the weights were averaged
