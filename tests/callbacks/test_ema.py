"""The moving average of the weights: its arithmetic, what is evaluated and saved, and resuming with it."""

import csv
import math
from pathlib import Path

import lightning
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.__main__ import run
from dino_lightning.callbacks import EMA
from tests.conftest import TINY_ARGS, TINY_SIZES

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Small(lightning.LightningModule):
    """Anyone's module: a shared layer, a frozen one, a batch norm with its counter, and integers large and small."""

    def __init__(self, rate=0.5):
        super().__init__()
        torch.manual_seed(5)
        self.rate = rate
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.last = nn.Linear(4, 2)
        self.register_buffer("index", torch.arange(530))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.validated = []

    def forward(self, x):
        return self.last(self.frozen(self.norm(self.again(self.first(x)))))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return self(batch).square().mean() + self(batch).mean()

    def validation_step(self, batch, batch_idx):
        self.log("score", self(batch).sum())
        self.validated.append(copied(self.state_dict()))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.rate, momentum=0.9)

    def train_dataloader(self):
        batches = torch.Generator().manual_seed(2)
        return DataLoader([torch.randn(8, 4, generator=batches) for _ in range(6)], batch_size=None)

    def val_dataloader(self):
        return DataLoader([torch.ones(2, 4)], batch_size=None)


AVERAGED = ("first", "again", "norm.weight", "norm.bias", "norm.running", "last")


def copied(state):
    return {name: value.detach().clone() for name, value in state.items()}


class Weights(lightning.Callback):
    """The raw weights after each optimizer step, at first those before."""

    def __init__(self):
        self.steps = []

    def on_train_start(self, trainer, pl_module):
        self.steps.append(copied(pl_module.state_dict()))
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.steps.append(copied(pl_module.state_dict())))


def fit(module, *callbacks, epochs=2, resume=None, **options):
    trainer = lightning.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**QUIET, **options})
    trainer.fit(module, ckpt_path=resume)
    return trainer


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------------- arithmetic


@settings(max_examples=10, deadline=None)
@given(
    decay=st.floats(0.01, 0.9999),
    tau=st.sampled_from([0.0, 1.0, 7.0, 2000.0]),
    accumulate=st.integers(1, 4),
    rate=st.floats(1e-4, 1.0),
)
def test_the_average_is_that_of_a_float64_reference(decay, tau, accumulate, rate):
    """One update for each optimizer step, each tensor once, the others left alone."""
    weights, module, average = Weights(), Small(rate), EMA(decay=decay, tau=tau)
    trainer = fit(module, weights, average, accumulate_grad_batches=accumulate)
    assert average.updates == trainer.global_step == len(weights.steps) - 1
    reference = {name: value.double().numpy() for name, value in weights.steps[0].items()}
    for update, step in enumerate(weights.steps[1:], start=1):
        rise = 1.0 if tau == 0 else 1 - math.exp(-update / tau)
        for name, value in step.items():
            if name.startswith(AVERAGED):
                reference[name] = decay * rise * reference[name] + (1 - decay * rise) * value.double().numpy()
            else:
                reference[name] = value.numpy()
    for name, value in module.state_dict().items():  # fit leaves the averages in the module
        assert value.numpy() == pytest.approx(reference[name], rel=1e-5, abs=1e-6), name
    assert torch.equal(module.index, torch.arange(530)) and module.steps == 12
    assert module.first is module.again


def test_the_quirks_of_the_published_average_are_not_ours():
    """There a tensor is averaged once for each name: with three, from 1 to 2, at decay 0.9, that gives 1.271."""

    class One(Small):
        def __init__(self):
            super().__init__()
            for parameter in self.parameters():
                nn.init.ones_(parameter)
            self.third = self.first

        def training_step(self, batch, batch_idx):
            return sum(-parameter.sum() for parameter in self.parameters() if parameter.requires_grad)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    module = One()
    fit(module, EMA(decay=0.9, tau=0.0), epochs=1, limit_train_batches=1, limit_val_batches=0)
    assert module.first.weight.flatten().tolist() == pytest.approx([1.1] * 16)
    assert torch.equal(module.index, torch.arange(530))


def test_what_is_unfrozen_during_training_is_averaged_from_then_on():
    class Unfreeze(lightning.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.frozen.requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.frozen.parameters())})

    module, weights = Small(), Weights()
    fit(module, Unfreeze(), weights, EMA(decay=0.9, tau=0.0))
    expected = weights.steps[6]["frozen.weight"]
    for step in weights.steps[7:]:
        expected = 0.9 * expected + 0.1 * step["frozen.weight"]
    torch.testing.assert_close(module.frozen.weight.detach(), expected)


# ---------------------------------------------------------------------- evaluated and saved


@pytest.mark.parametrize("evaluate", [True, False])
def test_every_checkpoint_holds_what_was_or_would_be_evaluated(tmp_path, evaluate):
    """Saved after validation, at the end of an epoch, within one, after training and by the way."""
    module, weights, average = Small(), Weights(), EMA(decay=0.8, tau=3.0, evaluate=evaluate)
    common = {"dirpath": tmp_path, "auto_insert_metric_name": False}
    best = ModelCheckpoint(filename="best{epoch}", monitor="score", save_top_k=-1, **common)
    last = ModelCheckpoint(filename="last{epoch}", save_on_train_epoch_end=True, save_top_k=-1, **common)
    steps = ModelCheckpoint(filename="step{step}", every_n_train_steps=4, save_top_k=-1, **common)
    trainer = fit(module, best, last, steps, average, weights, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    other = "raw_state_dict" if evaluate else "averaged_state_dict"
    average_of = {}
    for name, step in [
        ("best0", 6),
        ("best1", 12),
        ("last0", 6),
        ("last1", 12),
        ("step4", 4),
        ("step8", 8),
        ("after", 12),
    ]:
        content = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        raw, averaged = content[other], content["state_dict"]
        if not evaluate:
            raw, averaged = averaged, raw
        assert same(raw, weights.steps[step]), name
        assert same(average_of.setdefault(step, averaged), averaged), name
        assert not any(torch.equal(raw[key], averaged[key]) for key in raw if key.startswith(AVERAGED)), name
    for epoch, validated in enumerate(module.validated):
        step = 6 * (epoch + 1)
        assert same(validated, average_of[step] if evaluate else weights.steps[step])
    assert same(module.state_dict(), average_of[12] if evaluate else weights.steps[12])


def test_training_is_the_same_with_and_without_an_average():
    with_average, without = Weights(), Weights()
    fit(Small(), with_average, EMA())
    fit(Small(), without)
    assert all(same(*pair) for pair in zip(with_average.steps, without.steps, strict=True))


def test_frozen_and_integer_tensors_are_stored_once(tmp_path):
    trainer = fit(Small(), EMA())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for name, value in content["state_dict"].items():
        shared = value.data_ptr() == content["raw_state_dict"][name].data_ptr()
        assert shared != name.startswith(AVERAGED), name


@pytest.mark.parametrize("evaluate", [True, False])
def test_either_version_can_be_evaluated_later(tmp_path, evaluate):
    trainer = fit(Small(), EMA(decay=0.8, evaluate=evaluate))
    path = str(tmp_path / "a.ckpt")
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    other = content["raw_state_dict" if evaluate else "averaged_state_dict"]
    for callbacks, expected in (
        ([], content["state_dict"]),
        ([EMA(evaluate=evaluate)], content["state_dict"]),
        ([EMA(evaluate=not evaluate)], other),
    ):
        module = Small()
        lightning.Trainer(callbacks=callbacks, **QUIET).validate(module, ckpt_path=path, verbose=False)
        assert same(module.validated[0], expected)


# ---------------------------------------------------------------------- resuming


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    """Bit for bit, averages and raw weights."""
    fit(Small(), EMA(decay=0.9, tau=5.0), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    ends = {}
    for name, resume in (("whole", None), ("rest", str(tmp_path / "half.ckpt"))):
        trainer = fit(Small(), EMA(decay=0.9, tau=5.0), epochs=4, resume=resume)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        ends[name] = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
    whole, rest = ends["whole"], ends["rest"]
    assert whole["callbacks"] == rest["callbacks"] == {"EMA": {"updates": 24}}
    assert same(whole["state_dict"], rest["state_dict"])
    assert same(whole["raw_state_dict"], rest["raw_state_dict"])


class SaveAtThree(lightning.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 3 and not Path("three.ckpt").exists():
            trainer.save_checkpoint("three.ckpt")


def test_the_detector_resumes_in_the_middle_of_an_epoch(rooms, tmp_path):
    """Steps of two batches; the checkpoint is written by a callback that comes before the average."""
    ends = []
    for resume in (None, "three.ckpt"):
        lightning.seed_everything(1, verbose=False)
        data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=1)
        module = DINOModule(num_classes=data.num_classes, backbone_weights=None, lr=1e-3, **TINY_SIZES)
        options = {**QUIET, "accumulate_grad_batches": 2, "limit_val_batches": 1}
        trainer = lightning.Trainer(max_epochs=2, callbacks=[SaveAtThree(), EMA(decay=0.9, tau=4.0)], **options)
        trainer.fit(module, data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        ends.append(torch.load(tmp_path / "end.ckpt", weights_only=True))
    assert ends[0]["callbacks"]["EMA"] == ends[1]["callbacks"]["EMA"] == {"updates": 8}
    assert same(ends[0]["state_dict"], ends[1]["state_dict"])
    assert same(ends[0]["raw_state_dict"], ends[1]["raw_state_dict"])


def test_an_average_begins_where_a_checkpoint_has_none(tmp_path, caplog):
    path = str(tmp_path / "a.ckpt")
    fit(Small()).save_checkpoint(path)
    weights, average, module = Weights(), EMA(decay=0.9, tau=0.0), Small()
    with caplog.at_level("INFO"):
        fit(module, average, weights, epochs=3, resume=path)
    assert "holds no averaged weights: the average starts from its weights" in caplog.text
    assert average.updates == 6
    expected = weights.steps[0]["last.weight"]
    assert torch.equal(expected, torch.load(path, weights_only=True)["state_dict"]["last.weight"])
    for step in weights.steps[1:]:
        expected = 0.9 * expected + 0.1 * step["last.weight"]
    torch.testing.assert_close(module.last.weight.detach(), expected)


def test_a_second_fit_begins_a_new_average():
    module, average = Small(), EMA(decay=0.9)
    fit(module, average)
    between = copied(module.state_dict())
    weights = Weights()
    fit(module, average, weights, epochs=1)
    assert average.updates == 6
    assert same(weights.steps[0], between)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("options", [{"decay": 0.0}, {"decay": 1.0}, {"decay": 1.5}, {"tau": -1.0}], ids=str)
def test_an_average_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match="0"):
        EMA(**options)


def test_checkpoints_without_callbacks_are_refused(tmp_path):
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_weights_only=True)
    with pytest.raises(MisconfigurationException, match="save whole checkpoints with EMA"):
        fit(Small(), EMA(), checkpoint, enable_checkpointing=True)


def test_half_precision_weights_are_refused():
    with pytest.raises(MisconfigurationException, match="bf16-mixed"):
        fit(Small(), EMA(), precision="bf16-true")


# ---------------------------------------------------------------------- the detector


def values(path, name):
    with path.open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.fixture(scope="module")
def averaged_run(rooms, tmp_path_factory):
    """Two epochs by the command line with an average that moves."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    args = ["fit", "--data.root", str(rooms), *TINY_ARGS, f"--run_dir={folder}", "--data.batch_size=2"]
    args += ["--trainer.max_epochs=2", "--ema_decay=0.9", "--ema_tau=4", "--model.lr=0.002"]
    assert run(args) == 0
    return folder


def validated_loss(capsys, folder, *options):
    """The loss that `validate` finds for the last checkpoint."""
    capsys.readouterr()
    path = folder / "checkpoints" / "last.ckpt"
    all_digits = "--verbose=true"  # Lightning's own table
    args = [f"--ckpt_path={path}", f"--run_dir={folder}/look", "--trainer.logger=false", all_digits, *options]
    assert run(["validate", *args]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)
    return float("".join(letter for letter in line if letter.isdigit() or letter == "."))


def test_the_command_line_evaluates_and_keeps_the_average(averaged_run, capsys):
    during = values(averaged_run / "metrics.csv", "val/loss")[-1]
    assert validated_loss(capsys, averaged_run) == pytest.approx(during, rel=1e-4)
    raw = validated_loss(capsys, averaged_run, "--ema_evaluate=false")
    assert raw != pytest.approx(during, rel=1e-4)
    assert validated_loss(capsys, averaged_run, "--ema_decay=null") == pytest.approx(during, rel=1e-4)
    content = torch.load(averaged_run / "checkpoints" / "last.ckpt", weights_only=True)
    detector = DINOModule.load_from_checkpoint(averaged_run / "checkpoints" / "last.ckpt", map_location="cpu")
    assert same(detector.state_dict(), content["state_dict"])
    assert not same(content["state_dict"], content["raw_state_dict"])


def test_resuming_with_the_average_and_without(averaged_run, tmp_path, caplog):
    """Both train on from the raw weights, so they come to the same raw weights."""
    path = averaged_run / "checkpoints" / "last.ckpt"
    ends = {}
    for name, options in (("with", []), ("without", ["--ema_decay=0"])):
        caplog.clear()
        with caplog.at_level("INFO"):
            args = ["fit", f"--ckpt_path={path}", f"--run_dir={tmp_path / name}", "--trainer.max_epochs=3", *options]
            assert run(args) == 0
        assert "training resumes from the raw ones" in caplog.text
        ends[name] = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
    assert "raw_state_dict" not in ends["without"]
    assert same(ends["with"]["raw_state_dict"], ends["without"]["state_dict"])
    assert ends["with"]["callbacks"]["EMA"] == {"updates": 12}


@pytest.mark.parametrize("decay", ["1.5", "-0.5"])
def test_a_decay_that_is_none_ends_in_a_sentence(rooms, capsys, decay):
    assert run(["fit", "--data.root", str(rooms), *TINY_ARGS, f"--ema_decay={decay}"]) == 1
    assert "must be between 0 and 1, e.g. 0.9997" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_layers_see_the_average(rooms):
    """The compiled code must read the weights anew after they were exchanged."""
    seen = {}
    for name in ("compiled", "plain"):
        torch.manual_seed(0)
        data = CocoDataModule(root=str(rooms), fixed_size=64, num_workers=0, batch_size=4)
        module = DINOModule(num_classes=data.num_classes, backbone_weights=None, lr=1e-3, **TINY_SIZES)
        if name == "compiled":
            module.model.compile_layers(backend="aot_eager")
        trainer = lightning.Trainer(max_epochs=1, callbacks=[EMA(decay=0.9, tau=0.0)], **QUIET)
        trainer.fit(module, data)
        seen[name] = float(trainer.callback_metrics["val/loss"])
    assert seen["compiled"] == pytest.approx(seen["plain"], rel=1e-3)
