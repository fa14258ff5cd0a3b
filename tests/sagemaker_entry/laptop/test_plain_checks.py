"""An ordinary training is checked without PyTorch, and comes out as with all that `fit` has."""

import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dino_lightning.cli import plain_options
from dino_lightning.cli.command import expected_errors, explain
from dino_lightning.model import DINO
from dino_lightning.training.module import DINOModule
from sagemaker_entry.laptop import model_size
from sagemaker_entry.laptop.dataset_pack import read_dataset
from sagemaker_entry.laptop.fit_checks import checked_by_fit, counted_operations
from sagemaker_entry.laptop.plain_checks import checked_plainly
from sagemaker_entry.protocol.problem import Problem
from tests.cli.test_option_values import REFUSED_BY_FIT, TAKEN_BY_FIT

PROJECT = Path(__file__).parents[3]
CONFIG = ["--config", "room_detection.yaml"]
ORDINARY = [
    [],
    pytest.param(["--model.num_queries=300", "--trainer.max_steps=500"], marks=pytest.mark.slow),
    pytest.param(
        [
            "--model.weights=null",
            "--model.backbone_weights=null",
            "--model.hidden_dim=128",
            "--model.num_encoder_layers=3",
        ],
        marks=pytest.mark.slow,
    ),
    pytest.param(["--model.weights=dino_r50_5scale_12ep"], marks=pytest.mark.slow),
    ["--model.class_map={room: person}", "--model.lr=3", "--model.lr_drop_epochs=[4, 7]", "--seed_everything=7"],
    ["--data.fixed_size=96", "--data.fixed_size_mode=stretch", "--data.batch_size=3", "--data.num_workers=0"],
    ["--trainer.devices=[0, 1]", "--trainer.precision=16", "--trainer.limit_train_batches=0.5"],
    ["--trainer.devices=0,1", "--trainer.max_time=00:01:00:00", "--trainer.val_check_interval=5"],
    ["--ema_decay=0.5", "--early_stopping_patience=3", "--best_by=val/AP75", "--compress_gradients=true"],
]


def found(check, arguments):
    """What came out, or the sentence with which it was refused."""
    try:
        checked = check(arguments)
    except (*expected_errors(), Problem) as error:
        return explain(error)
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    if checked is None:
        return None
    data = checked.data
    about = (data.summary(), data.class_table(), data.class_names, data.images_per_epoch, len(data.val_set), data.root)
    options = {name: value for name, value in checked.options.items() if name != "config"}
    files = dict(data.split_files)
    return options, about, files, checked.image_size, checked.teraflops, checked.parameters


@pytest.mark.parametrize("own", ORDINARY, ids=" ".join)
def test_an_ordinary_training_comes_out_as_by_fit(own, rooms):
    arguments = [*CONFIG, *own, f"--data.root={rooms}"]
    plain = found(checked_plainly, arguments)
    assert plain is not None and plain == found(checked_by_fit, arguments)


@pytest.mark.parametrize(
    "own",
    [
        ["--model.lrr=1"],
        ["--trainer.max_epoch=3"],  # an abbreviation, which the real parser knows how to read
        ["--model.freeze=[backbone]"],
        ["--model.backbone=swin_t"],
        ["--data.augmentation_options={crop: 0}"],
        ["--data.drawn_plans=4", "--data.aspect_buckets=false"],
        ["--optimizer=torch.optim.SGD"],
        ["--trainer.strategy=lightning.pytorch.strategies.DDPStrategy"],
        ["--best_by=val/AP_class/room"],
        ["--auto_batch_size=16"],
        ["--run_dir=runs/mine"],
        ["--model.cuda_graphs=true"],
    ],
    ids=" ".join,
)
def test_whatever_else_there_is_is_left_to_fit(own, rooms):
    assert checked_plainly([*CONFIG, *own, f"--data.root={rooms}"]) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what odd values may be warned of
def test_odd_values_are_left_to_fit_or_come_out_alike(rooms, tmp_path):
    (tmp_path / "file").write_text("hello\n")
    wrong, alike = {}, 0
    for name, values in [*REFUSED_BY_FIT.items(), *TAKEN_BY_FIT.items()]:
        for each in values:
            value = each.replace("FILE", str(tmp_path / "file")).replace("FOLDER", str(tmp_path))
            arguments = [*CONFIG, f"--data.root={rooms}", f"--{name}={value}"]
            plain = found(checked_plainly, arguments)
            if plain is None:
                continue
            alike += 1
            if plain != (whole := found(checked_by_fit, arguments)):
                wrong[f"--{name}={each}"] = (plain, whole)
    assert not wrong and alike > 10


@pytest.mark.parametrize("held_out", [False, True])
def test_the_same_files_would_be_uploaded(held_out, rooms, tmp_path):
    root = rooms
    if held_out:  # no validation split: a part of the training images becomes it
        root = tmp_path
        shutil.copytree(rooms / "train", root / "train")
    arguments = [*CONFIG, f"--data.root={root}"]
    plain, whole = (read_dataset(check(arguments).data) for check in (checked_plainly, checked_by_fit))
    assert plain.manifest == whole.manifest and plain.key == whole.key


def test_a_wrong_dataset_is_refused_in_the_same_sentence(tmp_path):
    arguments = [*CONFIG, f"--data.root={tmp_path}"]
    assert found(checked_plainly, arguments) == found(checked_by_fit, arguments)
    assert "no annotation file found" in found(checked_plainly, arguments)


def test_cuda_graphs_of_images_of_many_sizes_are_refused_before_anything_is_sent(rooms):
    said = found(checked_by_fit, [*CONFIG, "--model.cuda_graphs=true", f"--data.root={rooms}"])
    assert "--data.fixed_size" in said and "leave out --model.cuda_graphs" in said


@pytest.mark.parametrize("group", ["model", "trainer"])
def test_an_empty_group_is_left_to_fit_which_says_so(group, rooms, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(f"best_by: val/F1\n{group}:\n")
    arguments = ["--config", str(file), f"--data.root={rooms}"]
    assert checked_plainly(arguments) is None
    assert found(checked_by_fit, arguments).startswith(f"{group}: has no options in the configuration")


def test_a_trainer_of_other_options_is_left_to_fit(rooms, monkeypatch):
    arguments = [*CONFIG, f"--data.root={rooms}"]
    assert checked_plainly(arguments) is not None
    monkeypatch.setattr(plain_options, "trainer_signature", lambda: "another")
    assert checked_plainly(arguments) is None


def test_a_dry_run_imports_neither_pytorch_nor_lightning(rooms, no_account):
    code = (
        "import sys\nfrom sagemaker_entry import launch\n"
        f"code = launch.main(['--config', 'room_detection.yaml', '--data', {str(rooms)!r}, '--role', 'R', '--dry-run'])"
        "\nprint(code, sorted(set(sys.modules) & {'torch', 'torchvision', 'lightning', 'torchmetrics', 'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "The request would be" in done.stdout


SIZES = [
    ({}, 1, (96, 128)),
    ({"num_queries": 300, "query_groups": 3, "trainable_backbone_layers": 5}, 3, (481, 619)),
    (
        {"hidden_dim": 128, "num_heads": 4, "num_points": 2, "ffn_dim": 256, "num_decoder_layers": 3}
        | {"shared_heads": False, "num_encoder_layers": 0, "num_queries": 50},
        7,
        (333, 257),
    ),
    pytest.param(
        {"feature_strides": [4, 8, 16, 32], "num_feature_levels": 5, "trainable_backbone_layers": 0},
        2,
        (200, 300),
        marks=pytest.mark.slow,
    ),
    ({"num_feature_levels": 3, "num_encoder_layers": 1, "trainable_backbone_layers": 4}, 91, (32, 32)),
]


@pytest.mark.parametrize(("own", "num_classes", "size"), SIZES)
def test_the_size_of_a_model_by_arithmetic_is_that_of_the_model(own, num_classes, size):
    model = {name: parameter.default for name, parameter in inspect.signature(DINO).parameters.items()}
    model |= {"freeze": None, **own}
    module = DINOModule(num_classes=num_classes, backbone_weights=None, **own)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert model_size.is_known(model)
    assert model_size.parameters(model, num_classes) == trained
    assert model_size.operations(model, num_classes, *size) == counted_operations(module, *size)


def test_the_published_model_has_the_defaults_of_dino():
    defaults = {name: parameter.default for name, parameter in inspect.signature(DINO).parameters.items()}
    assert {name: defaults[name] for name in model_size.PUBLISHED} == model_size.PUBLISHED
