"""Rates, warm-up, layer-wise rates, freezing and early stopping."""

import csv
import math

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import MultiStepLR

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.__main__ import run
from dino_lightning.errors import CheckpointError
from dino_lightning.model import DINO
from dino_lightning.training.optim import freeze_parts, parameter_groups
from dino_lightning.training.schedule import RateSchedule, drop_epochs
from tests.conftest import TINY_ARGS, TINY_SIZES


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


def tiny_module(**changes):
    return DINOModule(**{"num_classes": 4, "backbone_weights": None, **TINY_SIZES, **changes})


@pytest.fixture
def data(rooms):
    return CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)


class Rates(lightning.Callback):
    """Those of each step; saves after some of them."""

    def __init__(self, save_after=None):
        self.seen = []
        self.save_after = save_after or {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step in self.save_after:
            trainer.save_checkpoint(self.save_after[trainer.global_step])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


def rates_of(data, *, epochs=4, batches=3, resume=None, save=None, save_after=None, trainer=(), **options):
    """The rate of each optimizer step outside the backbone."""
    recorder = Rates(save_after)
    trainer = lightning.Trainer(
        max_epochs=epochs, limit_train_batches=batches, callbacks=[recorder], **{**QUIET, **dict(trainer)}
    )
    trainer.fit(tiny_module(num_classes=data.num_classes, **options), data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return recorder.seen


# ---------------------------------------------------------------------- rates


@settings(max_examples=40, deadline=None)
@given(
    rate=st.floats(1e-6, 1e-2),
    gamma=st.sampled_from([0.1, 0.3, 0.5]),
    milestones=st.lists(st.integers(1, 8), unique=True),
    steps=st.integers(1, 4),
)
def test_without_warm_up_the_rates_are_those_of_multi_step_lr(rate, gamma, milestones, steps):
    """To the last bit: the published recipe stays what it was."""
    ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=rate) for _ in range(2))
    schedule = RateSchedule(ours, milestones=milestones, gamma=gamma)
    published = MultiStepLR(theirs, milestones=milestones, gamma=gamma)
    step = 0
    for epoch in range(10):
        schedule.at(step=step, epoch=epoch)
        for _ in range(steps):
            assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
            ours.step()
            theirs.step()
            schedule.step()
            step += 1
        published.step()


def test_the_rate_rises_step_by_step_and_drops_by_epochs(data):
    rates = rates_of(data, warmup_steps=5, lr=1e-3, lr_drop_epochs=[3])
    rise = [1e-3 * step / 5 for step in range(1, 6)]
    assert rates == pytest.approx(rise + [1e-3] * 4 + [1e-4] * 3)


@pytest.mark.parametrize("epochs", [10, -1])
def test_the_rate_drops_before_the_end_that_max_steps_sets(data, epochs):
    rates = rates_of(data, lr=1e-3, epochs=epochs, trainer={"max_steps": 8})  # two epochs of three steps, and two steps
    assert rates == pytest.approx([1e-3] * 6 + [1e-4] * 2)


def test_a_drop_during_the_rise_counts(data):
    rates = rates_of(data, warmup_steps=6, lr=1e-3, lr_drop_epochs=[1], epochs=2)
    assert rates == pytest.approx([1e-3 / 6, 2e-3 / 6, 3e-3 / 6, 4e-4 / 6, 5e-4 / 6, 1e-4])


def test_accumulated_batches_are_one_step_of_the_rise(data):
    rates = rates_of(
        data, warmup_steps=4, lr=1e-3, lr_drop_epochs=[], batches=4, epochs=2, trainer={"accumulate_grad_batches": 2}
    )
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])


def test_half_a_cosine_ends_with_the_training(data):
    rates = rates_of(data, lr_schedule="cosine", warmup_steps=2, lr=1e-3)
    expected = [1e-3 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2 for step in range(2, 12)]
    assert rates == pytest.approx([5e-4, 1e-3, *expected])


def test_a_cosine_without_an_end_is_refused(data):
    with pytest.raises(ValueError, match="set max_epochs or max_steps"):
        rates_of(data, lr_schedule="cosine", epochs=-1)


@pytest.mark.parametrize(
    "options", [{"warmup_steps": 8}, {"lr_schedule": "cosine"}, {"lr_drop_epochs": [1, 3]}], ids=str
)
def test_a_resumed_run_has_the_rates_of_one_that_was_not_interrupted(data, tmp_path, options):
    whole = rates_of(data, **options)
    saved = str(tmp_path / "a.ckpt")
    first = rates_of(data, epochs=2, save=saved, **{**options, "lr_drop_epochs": options.get("lr_drop_epochs", [])})
    rest = rates_of(data, resume=saved, **options)
    if "lr_schedule" not in options:  # a cosine over two epochs is another one than over four
        assert first == pytest.approx(whole[:6])
    assert rest == whole[6:]


@pytest.mark.parametrize("options", [{"lr_drop_epochs": [1]}, {"lr_schedule": "cosine", "warmup_steps": 2}], ids=str)
def test_a_run_resumed_in_the_middle_of_an_epoch_has_its_rates(data, tmp_path, options):
    places = {step: str(tmp_path / f"{step}.ckpt") for step in (4, 8)}
    whole = rates_of(data, save_after=places, **options)
    for step, saved in places.items():
        assert rates_of(data, resume=saved, **options) == whole[step:]
    assert rates_of(data, resume=places[4], lr=3e-3, lr_drop_epochs=[2]) == pytest.approx([3e-3] * 2 + [3e-4] * 6)


def test_when_resuming_the_values_of_now_win(data, tmp_path):
    saved = str(tmp_path / "a.ckpt")
    rates_of(data, epochs=2, save=saved, lr=1e-3, warmup_steps=20)
    rest = rates_of(data, resume=saved, lr=5e-4, warmup_steps=8, lr_drop_epochs=[3], lr_drop_factor=0.5)
    assert rest == pytest.approx([5e-4 * 7 / 8, 5e-4, 5e-4, *[2.5e-4] * 3])


def test_a_longer_schedule_that_raises_a_dropped_rate_is_told(data, tmp_path, caplog):
    """A run of three epochs has dropped its rate after the second; resumed with six, it would drop after the fifth."""
    saved, early = str(tmp_path / "a.ckpt"), str(tmp_path / "early.ckpt")
    with caplog.at_level("INFO"):
        assert rates_of(data, epochs=3, save=saved, save_after={2: early}, lr=1e-3, warmup_steps=4)[-1] == 1e-4
        assert "learning rate" not in caplog.text
        rates_of(data, epochs=3, resume=early, lr=1e-3, warmup_steps=4)  # nothing changes
        rates_of(data, epochs=4, resume=saved, lr=2e-3, lr_drop_epochs=[2])  # another full rate is no drop
        assert "learning rate" not in caplog.text
        rates_of(data, epochs=4, resume=saved, lr=1e-3, batches=1)  # the drop moves, and the rate stays low
        assert "learning rate" not in caplog.text
        assert rates_of(data, epochs=6, resume=saved, lr=1e-3) == pytest.approx([1e-3] * 6 + [1e-4] * 3)
        told = [record.message for record in caplog.records if "learning rate" in record.message]
        assert told == [
            "The learning rate was 0.0001 when the checkpoint was saved and continues with 0.001: now it drops after "
            'epoch 5. To keep the lower rate, add --model.lr_drop_epochs "[3]".'
        ]
        caplog.clear()
        assert rates_of(data, epochs=6, resume=saved, lr=1e-3, lr_drop_epochs=[3]) == pytest.approx([1e-4] * 9)
        assert "learning rate" not in caplog.text
        rates_of(data, epochs=12, resume=saved, lr=1e-3, lr_schedule="cosine", batches=1)
        assert "its cosine now ends at step 12." in caplog.text


@pytest.mark.parametrize(
    ("epochs", "published", "short"),
    [(None, [], []), (1, [], []), (2, [1], [1]), (3, [2], [2]), (6, [5], [5]), (12, [11], [10]), (36, [33], [29])],
    ids=str,
)
def test_the_default_drop_comes_before_the_last_epoch(epochs, published, short):
    assert drop_epochs(epochs) == published
    assert drop_epochs(epochs, 4 / 5) == short
    assert drop_epochs(24) == [22] and drop_epochs(50) == [46]


def test_a_schedule_stored_by_an_earlier_version_is_passed_over(data, tmp_path):
    saved = tmp_path / "a.ckpt"
    rates_of(data, epochs=2, save=saved, lr=1e-3)
    content = torch.load(saved, weights_only=True)
    content["lr_schedulers"] = [{"milestones": {1: 1}, "gamma": 0.5, "base_lrs": [9.0, 9.0], "last_epoch": 2}]
    torch.save(content, saved)
    assert rates_of(data, epochs=3, resume=str(saved), lr=1e-3, lr_drop_epochs=[]) == [1e-3] * 3


def test_the_rates_are_logged_step_by_step(rooms, tmp_path):
    args = ["fit", "--data.root", str(rooms), *TINY_ARGS, "--run_dir=run", "--data.batch_size=2"]
    args += ["--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--model.warmup_steps=4", "--model.lr=0.001"]
    assert run(args) == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = [float(row["lr-AdamW/pg1"]) for row in csv.DictReader(file) if row["lr-AdamW/pg1"]]
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001])


# ---------------------------------------------------------------------- layer-wise rates


def groups_of(model, **options):
    return parameter_groups(model, lr=1e-4, backbone_lr=1e-5, weight_decay=1e-4, **options)


@pytest.mark.parametrize("rule", ["default", "offsets", "no_norm_decay"])
def test_each_stage_of_the_backbone_has_its_rate(rule):
    model = DINO(num_classes=2, **TINY_SIZES)
    flat, staged = groups_of(model, rule=rule), groups_of(model, rule=rule, backbone_layer_decay=0.5)
    assert sum(len(group["params"]) for group in flat) == sum(len(group["params"]) for group in staged)
    every = [id(parameter) for group in staged for parameter in group["params"]]
    assert len(every) == len(set(every))
    rate_of = {id(p): (group["lr"], group["weight_decay"]) for group in staged for p in group["params"]}
    before = {id(p): (group["lr"], group["weight_decay"]) for group in flat for p in group["params"]}
    rates = {"conv1": 1 / 16, "bn1": 1 / 16, "layer1": 1 / 8, "layer2": 1 / 4, "layer3": 1 / 2, "layer4": 1}
    for name, parameter in model.named_parameters():
        rate, decay = before[id(parameter)]
        factor = rates[name.split(".")[2]] if name.startswith("backbone.") else 1
        assert rate_of[id(parameter)] == pytest.approx((rate * factor, decay)), name


@pytest.mark.parametrize("backbone", ["convnext_tiny", "swin_t"])
def test_blocks_in_one_sequence_fall_into_the_same_stages(backbone):
    """There each reduction of the maps opens a stage, as in a ResNet."""
    model = DINO(num_classes=2, **{**TINY_SIZES, "backbone": backbone, "backbone_norm": "batch"})
    groups = groups_of(model, backbone_layer_decay=0.5)[1:]
    assert [group["lr"] for group in groups] == pytest.approx([1e-5 / 16, 1e-5 / 8, 1e-5 / 4, 1e-5 / 2, 1e-5])
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks = [{name_of[id(p)].removeprefix("backbone.").split(".")[2] for p in g["params"]} for g in groups]
    maps = {".".join(name.split(".")[:1]) for name, _ in model.backbone.norms.named_parameters()}
    assert blocks == [{"0"}, {"1"}, {"2", "3"}, {"4", "5"}, {"6", "7", "weight", "bias"}], maps


def test_fixed_stages_have_no_group():
    groups = groups_of(DINO(num_classes=2, **{**TINY_SIZES, "trainable_backbone_layers": 3}), backbone_layer_decay=0.5)
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-5 / 4, 1e-5 / 2, 1e-5])


# ---------------------------------------------------------------------- freezing


class Watch(lightning.Callback):
    """What is in evaluation mode, has a gradient and is in the optimizer during training."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.evaluating = {name for name, module in pl_module.model.named_modules() if not module.training}
        self.with_gradient = {name for name, p in pl_module.model.named_parameters() if p.grad is not None}
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.optimized = {name for name, p in pl_module.model.named_parameters() if id(p) in optimized}


@pytest.mark.parametrize(
    "parts", [["backbone"], ["backbone", "neck", "encoder"], ["decoder.layers", "label_embedding"]]
)
def test_frozen_parts_stay_as_they_are(data, parts):
    module = tiny_module(num_classes=data.num_classes, freeze=parts, dropout=0.1, backbone_norm="batch")
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    watch = Watch()
    # validation in between: Lightning gives every part its mode back
    options = {**QUIET, "limit_val_batches": 1, "limit_train_batches": 2, "max_epochs": 2}
    lightning.Trainer(callbacks=[watch], **options).fit(module, data)
    fixed = {name for name in before if name.startswith(tuple(f"{part}." for part in parts))}
    after = module.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in fixed)
    parameters = {name for name, _ in module.model.named_parameters()}
    assert watch.with_gradient == watch.optimized == parameters - fixed
    still = {name for name in parameters - fixed if torch.equal(after[name], before[name])}
    # a fresh encoder looks at the same places whatever the level, so a frozen fresh one gives levels no gradient
    assert still <= {"level_embedding"}
    assert watch.evaluating == {
        n for n, _ in module.model.named_modules() if f"{n}.".startswith(tuple(f"{p}." for p in parts))
    }


@pytest.mark.parametrize("name", ["spine", "decoder.spine", ""])
def test_an_unknown_part_is_refused_with_the_parts_there_are(name):
    with pytest.raises(ValueError, match=rf"no part '{name}'; the parts are .*encoder, decoder, .*neck, backbone,"):
        tiny_module(freeze=[name])


def test_freezing_everything_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to train"):
        freeze_parts(model, ["0"])


def test_freezing_on_the_command_line(rooms, tmp_path, capsys):
    args = ["fit", "--data.root", str(rooms), *TINY_ARGS, "--run_dir=run", "--data.batch_size=4"]
    args += ["--trainer.max_epochs=1"]
    assert run([*args, "--model.freeze=[spine]"]) == 1
    assert "there is no part 'spine'; the parts are encoder" in capsys.readouterr().err
    assert run([*args, "--model.freeze=[backbone]"]) == 0
    capsys.readouterr()
    assert run(["fit", "--run_dir=run", "--ckpt_path=last", "--model.freeze=null", "--trainer.max_epochs=2"]) == 1
    error = capsys.readouterr().err
    assert "Resume with the same freeze" in error and "Traceback" not in error
    assert run(["fit", "--run_dir=run", "--ckpt_path=last", "--model.freeze=[backbone]", "--trainer.max_epochs=2"]) == 0


def test_other_groups_than_the_checkpoints_are_refused(data, tmp_path):
    saved = str(tmp_path / "a.ckpt")
    rates_of(data, epochs=1, save=saved)
    with pytest.raises(CheckpointError, match="backbone_layer_decay"):
        rates_of(data, resume=saved, backbone_layer_decay=0.8)


# ---------------------------------------------------------------------- early stopping


def test_training_stops_when_the_ap_stays(rooms, tmp_path):
    """With rates of nothing the AP cannot improve: two validations without patience for more."""
    args = ["fit", "--data.root", str(rooms), *TINY_ARGS, "--run_dir=run", "--data.batch_size=4"]
    args += ["--trainer.max_epochs=6", "--model.lr=0", "--model.backbone_lr=0"]
    assert run([*args, "--early_stopping_patience=1"]) == 0
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("patience", ["0", "-1", "1.5"])
def test_an_impossible_patience_is_refused(rooms, tmp_path, capsys, patience):
    assert run(["fit", "--data.root", str(rooms), *TINY_ARGS, f"--early_stopping_patience={patience}"]) == 2
    assert "early_stopping_patience" in capsys.readouterr().err
