"""Settings of PyTorch for the speed of a CUDA device: what a training sets, and what it leaves behind."""

from types import SimpleNamespace

import lightning
import pytest
import torch

from dino_lightning.callbacks import DeviceSettings
from dino_lightning.callbacks.device_settings import may_benchmark
from dino_lightning.cli.lightning_cli import parsed_options
from dino_lightning.cli.running import execute
from tests.conftest import TINY_ARGS


def settings():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark


@pytest.fixture(autouse=True)
def as_before():
    before = settings()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.benchmark = before[1]


class Noted(lightning.Callback):
    """What is set in a step of training and in one of validation."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training, self.callbacks = settings(), trainer.callbacks

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validation = settings()


def fit(rooms, *args):
    noted = Noted()
    own = ["--data.root", str(rooms), *TINY_ARGS, "--trainer.fast_dev_run=true", "--data.fixed_size=96"]
    execute("fit", [*own, *args], callbacks=[noted])
    return noted


def test_a_cpu_keeps_its_settings(rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noted = fit(rooms, "--float32_matmul_precision=medium")
    assert noted.training == noted.validation == settings() == ("highest", False)
    (callback,) = [each for each in noted.callbacks if isinstance(each, DeviceSettings)]
    assert (callback.precision, callback.benchmark) == ("medium", True)


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "expected"), [("32-true", "high"), ("bf16-mixed", "highest")])
def test_a_gpu_has_them_for_the_training_alone(rooms, tmp_path, monkeypatch, precision, expected):
    monkeypatch.chdir(tmp_path)
    noted = fit(rooms, "--trainer.accelerator=gpu", "--trainer.devices=1", f"--trainer.precision={precision}")
    assert noted.training == (expected, True)
    assert noted.validation == (expected, False)
    assert settings() == ("highest", False)


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        (["--data.fixed_size=96"], True),
        ([], False),
        (["--data.fixed_size=96", "--trainer.benchmark=false"], False),
        (["--data.fixed_size=96", "--trainer.deterministic=false"], False),
    ],
)
def test_cudnn_chooses_by_time_for_one_size_unless_the_user_decides(given, allowed):
    assert may_benchmark(parsed_options(["--data.root=x", *given])) is allowed


def trainer(precision="32-true", device="cuda"):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), precision=precision)


@pytest.mark.parametrize(
    ("option", "precision", "before", "capability", "during"),
    [
        (None, "32-true", "highest", (8, 6), "high"),
        (None, "32-true", "highest", (7, 5), "highest"),  # has no TensorFloat-32
        (None, "32-true", "medium", (8, 6), "medium"),  # the user's own
        (None, "bf16-mixed", "highest", (8, 6), "highest"),  # what is left in float32 is so on purpose
        ("highest", "32-true", "highest", (8, 6), "highest"),
        ("medium", "bf16-mixed", "high", (8, 6), "medium"),
    ],
)
def test_products_by_rule_by_option_and_as_before(monkeypatch, capsys, option, precision, before, capability, during):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    torch.set_float32_matmul_precision(before)
    callback = DeviceSettings(float32_matmul_precision=option)
    callback.on_fit_start(trainer(precision), None)
    assert torch.get_float32_matmul_precision() == during
    said = capsys.readouterr().out
    assert ("TensorFloat-32" in said) is (option is None and during != before)
    callback.on_fit_end(trainer(precision), None)
    assert torch.get_float32_matmul_precision() == before


def test_a_run_that_fails_restores_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    callback = DeviceSettings(benchmark=True)
    callback.on_fit_start(trainer(), None)
    callback.on_validation_end(trainer(), None)  # of the sanity check, before training
    assert settings() == ("high", False)
    callback.on_train_start(trainer(), None)
    assert settings() == ("high", True)
    callback.on_validation_start(trainer(), None)
    assert settings() == ("high", False)
    callback.on_validation_end(trainer(), None)
    assert settings() == ("high", True)
    callback.on_exception(trainer(), None, KeyboardInterrupt())
    assert settings() == ("highest", False)


def test_whoever_asked_for_deterministic_algorithms_keeps_them():
    torch.use_deterministic_algorithms(True)
    try:
        DeviceSettings(benchmark=True).on_train_start(trainer(), None)
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
