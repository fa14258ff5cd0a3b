"""Odd values over the options of all commands: refused in one sentence, or values that make sense."""

import pytest

from dino_lightning.__main__ import run
from sagemaker_entry import launch
from tests.conftest import TINY_ARGS, forget_earlier_runs

ONE_STEP = ["--trainer.fast_dev_run=true"]
AN_EPOCH = [f"--trainer.{name}=1" for name in ("max_epochs", "limit_train_batches", "limit_val_batches")]

# Values that are refused, for each option of `fit`; separated by blanks, "" is the empty text.
REFUSED_BY_FIT = {
    "seed_everything": ["-1", "1.5", "99999999999999999999", "many", "[1]"],
    "ckpt_path": ["nowhere", "FOLDER", "FILE"],
    "config": ["nowhere.yaml", "FOLDER", "FILE"],
    "run_dir": ["FILE", "FILE/run"],
    "save_every_minutes": [".nan", ".inf", "-1", "inf", "soon", "null", "[1]"],
    "save_every_steps": ["-1", "1.5"],
    "ema_decay": [".nan", "1.5", "-1", "inf", "1"],
    "ema_tau": [".nan", ".inf", "-1", "inf"],
    "early_stopping_patience": ["0", "-1"],
    "auto_batch_size": ["0", "-3", "two"],
    "data.root": ["", "nowhere", "FILE", "null", "[a]"],
    "data.train_annotations": ["nowhere.json", "FOLDER", "FILE", "\u2603"],
    "data.train_images": ["nowhere", "FILE"],
    "data.crowd": ["yes", ""],
    "data.box_format": ["xyzw", "[]"],
    "data.classes": ["[nothing]", "[]", "{a: 1}"],
    "data.merge_classes": ["{a: [b]}", "[a]", "5"],
    "data.batch_size": ["0", "-1", "1.5", "null", "[1]"],
    "data.val_batch_size": ["0", "-1"],
    "data.num_workers": ["-1", "1.5"],
    "data.augmentation": ["strong", ""],
    "data.augmentation_options": ["{rotation: nan}", "{no_such: 1}", "{crop: 7}", "5"],
    "data.image_size": ["0", "-5"],
    "data.max_size": ["0", "-1"],
    "data.fixed_size": ["0", "-1", "999999999"],
    "data.fixed_size_mode": ["stretch", "crop"],
    "data.pad_to_multiple": ["0", "-32", "999999999"],
    "data.cache_gigabytes": [".nan", ".inf", "0", "-1", "inf"],
    "data.cache_dir": ["FILE"],
    "data.val_fraction": [".nan", "0", "1", "-0.1", "7"],
    "data.on_bad_image": ["ignore"],
    "data.seed": ["1.5"],
    "data.drawn_plans": ["-1"],
    "data.mosaic": [".nan", "1.5", "-1"],
    "data.transforms": ["[nothing]", "5"],
    "data.repeat_factor_threshold": [".nan", "0", "7", "-1"],
    "model.weights": ["nowhere.pth", "FILE", "FOLDER", "no_such_name"],
    "model.class_map": ["[a]", "5"],
    "model.rooms_lr_factor": [".nan", ".inf", "-1", "inf", "0"],
    "model.backbone_weights": ["nowhere", "FILE"],
    "model.tta_views": ["0", "3", "16", "1.5", "null", "all"],
    "model.lr": [".nan", ".inf", "-1", "inf", "fast", "null", "[1]"],
    "model.backbone_lr": [".nan", ".inf", "-1", "inf"],
    "model.backbone_layer_decay": [".nan", ".inf", "-1", "inf", "0"],
    "model.weight_decay": [".nan", ".inf", "-1", "inf"],
    "model.group_rule": ["none"],
    "model.recipe": ["long"],
    "model.clip_grad_norm": [".nan", "-1"],
    "model.max_non_finite_steps": ["-1"],
    "model.warmup_steps": ["-1", "1.5"],
    "model.lr_schedule": ["linear"],
    "model.lr_drop_epochs": ["[-1]", "5", "[nan]"],
    "model.lr_drop_factor": [".nan", ".inf", "-1", "inf", "0", "2"],
    "model.class_loss": ["nll"],
    "model.class_loss_weight": [".nan", ".inf", "-1", "inf"],
    "model.matching_cost": ["best"],
    "model.matching_solver": ["best"],
    "model.box_noise_scale": [".nan", ".inf", "-1", "inf"],
    "model.freeze": ["[nothing]", "backbone"],
    "model.max_detections": ["0", "-1"],
    "model.nms_iou_threshold": [".nan", "7", "-1"],
    "model.backbone": ["", "resnet7", "timm/", "[a]"],
    "model.backbone_norm": ["none"],
    "model.trainable_backbone_layers": ["-1", "9"],
    "model.feature_strides": ["[]", "[7]", "[16, 16]", "16"],
    "model.num_feature_levels": ["0", "-1", "99"],
    "model.hidden_dim": ["0", "-4", "7"],
    "model.num_heads": ["0", "-1", "5"],
    "model.num_points": ["0", "-1"],
    "model.ffn_dim": ["0", "-1"],
    "model.num_encoder_layers": ["-1"],
    "model.num_decoder_layers": ["0", "-1"],
    "model.num_queries": ["0", "-1", "999999999"],
    "model.num_denoising": ["-1"],
    "model.label_noise_ratio": [".nan", "-1", "7"],
    "model.denoising_multiple": ["0"],
    "model.query_groups": ["0", "-1"],
    "model.dropout": [".nan", "-1", "7"],
    "model.position_temperature": [".nan", "0", "-1"],
    "model.position_offset": [".nan", ".inf", "inf"],
    "model.box_epsilon": [".nan", "-1", "0", "7"],
    "trainer.accelerator": ["abacus", "gpu"],
    "trainer.strategy": ["none"],
    "trainer.devices": ["0", "-5", "many"],
    "trainer.num_nodes": ["0", "-1"],
    "trainer.precision": ["8", "many"],
    "trainer.max_epochs": ["-5", "1.5"],
    "trainer.max_steps": ["-5"],
    "trainer.max_time": ["soon", "5"],
    "trainer.limit_train_batches": [".nan", "-1", "7.5"],
    "trainer.limit_val_batches": [".nan", "-1", "1.5"],
    "trainer.overfit_batches": [".nan", "-1"],
    "trainer.val_check_interval": [".nan", "-1", "7.5"],
    "trainer.check_val_every_n_epoch": ["0", "-1"],
    "trainer.num_sanity_val_steps": ["-5"],
    "trainer.log_every_n_steps": ["-1"],
    "trainer.accumulate_grad_batches": ["0", "-1"],
    "trainer.gradient_clip_val": [".nan", "-1"],
    "trainer.gradient_clip_algorithm": ["none"],
}
# Odd values that make sense, and what they mean.
TAKEN_BY_FIT = {
    "seed_everything": ["0", "4294967295", "true"],
    "save_every_minutes": ["0", "1e-9"],
    "save_every_steps": ["0", "999999999"],
    "ema_decay": ["0", "0.5"],
    "ema_tau": ["0"],
    "run_dir": ["r\u00fcn \u2603"],
    "data.image_size": ["999999999"],  # the long side decides
    "data.max_size": ["999999999"],  # the short side decides
    "data.seed": ["-1"],  # a name for a shuffle
    "data.cache_gigabytes": ["0.001"],
    "model.lr": ["0", "1e-30"],
    "model.clip_grad_norm": ["0"],
    "model.warmup_steps": ["999999999"],
    "model.lr_drop_epochs": ["[]", "[999999999]"],
    "model.max_detections": ["999999999"],  # all that there are
    "model.num_denoising": ["0"],
    "model.num_encoder_layers": ["0"],
    "trainer.log_every_n_steps": ["0"],  # no step is logged
    "trainer.max_epochs": ["0"],  # nothing is trained
    "trainer.limit_train_batches": ["0.5", "999999999"],
}


@pytest.fixture(scope="module")
def place(rooms, tmp_path_factory):
    """A working directory with a run of one step, a folder and a file that is nothing."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "folder").mkdir()
    (folder / "file").write_text("hello\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        args = ["--data.root", str(rooms), "--run_dir", "run", *TINY_ARGS, *AN_EPOCH]
        assert run(["fit", *args]) == 0
        yield folder


def outcome(command, args, capsys):
    """The exit code, and what was said about it; anything raised is the text after "raised"."""
    forget_earlier_runs()
    capsys.readouterr()
    try:
        code = command(args)
    except (SystemExit, Exception) as error:
        return "raised", f"{type(error).__name__}: {error}"
    return code, capsys.readouterr().err


def complaint(code, said, refused):
    """Why this outcome is not the one that is wanted; "" if it is."""
    if code == "raised":
        return said[:200]
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    if refused:
        if code not in (1, 2) or len(sentences) != 1:
            return f"exit code {code} with {len(sentences)} sentences: {said[-200:]}"
        return "" if len(sentences[0]) < 600 else f"long: {sentences[0]}"
    return "" if code == 0 and not sentences else f"exit code {code}: {said[-200:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # what odd values may be warned of
@pytest.mark.parametrize(
    ("values", "refused"), [(REFUSED_BY_FIT, True), (TAKEN_BY_FIT, False)], ids=["refused", "taken"]
)
def test_odd_values_of_fit(values, refused, place, rooms, capsys):
    wrong = {}
    for number, (name, each) in enumerate((name, each) for name, several in values.items() for each in several):
        value = each.replace("FILE", str(place / "file")).replace("FOLDER", str(place / "folder"))
        short = AN_EPOCH if name.startswith("trainer.") else ONE_STEP  # which hides options of the Trainer
        args = ["fit", "--data.root", str(rooms), f"--run_dir=odd{number}", *TINY_ARGS, *short, f"--{name}={value}"]
        code, said = outcome(run, args, capsys)
        if reason := complaint(code, said, refused):
            wrong[f"--{name}={each}"] = reason
    assert not wrong


# (command, its needed options, {option: values that are refused})
REFUSED_BY_OTHERS = [
    (
        "predict",
        ["--ckpt_path=run", "--images=IMAGES", "--output=found", "--trainer.accelerator=cpu"],
        {
            "ckpt_path": ["", "FILE", "FOLDER", "nowhere"],
            "images": ["", "nowhere", "FOLDER", "FILE", "\u2603"],
            "image_folder": ["nowhere"],
            "output": ["FILE"],
            "threshold": ["nan", "inf", "-1", "7.0", "true", "", "null"],
            "tile": ["0", "-5", "1.5", "nan"],
            "overlap": ["1", "-1", "nan", "inf"],
            "batch_size": ["0", "-1", "nan"],
            "num_workers": ["-1", "1.5"],
            "whole_image": ["yes", ""],
            "trainer.accelerator": ["abacus", "gpu"],
            "trainer.devices": ["0", "-5", "many"],
            "trainer.precision": ["8", ""],
        },
    ),
    (
        "validate",
        ["--ckpt_path=run", "--data.root=DATA", "--trainer.accelerator=cpu", "--report=false"],
        {
            "ckpt_path": ["FILE", "FOLDER", "nowhere"],
            "data.root": ["nowhere", "FILE", "FOLDER"],
            "against": ["nowhere"],
            "seed_everything": ["-1"],
            "data.val_batch_size": ["0"],
            "trainer.limit_val_batches": ["-1", ".nan"],
        },
    ),
    (
        "export",
        ["--ckpt_path=run", "--format=onnx"],
        {"ckpt_path": ["FILE", "nowhere"], "format": ["", "pdf"], "output": ["FILE"], "opset": ["1", "nan", "-3"]},
    ),
    (
        "convert",
        ["--weights=run", "--output=out.pth"],
        {"weights": ["", "FILE", "FOLDER", "nowhere"], "output": ["", "FOLDER"], "layout": ["yolo", ""]},
    ),
    ("inspect", ["--data.root=DATA"], {"data.root": ["", "nowhere", "FILE", "FOLDER"], "output": ["FILE/x"]}),
    (
        "preview",
        ["--data.root=DATA"],
        {
            "num_images": ["0", "-1", "nan"],
            "split": ["none"],
            "output": ["FOLDER", "FILE/x.png"],
            "seed": ["nan"],
            "data.mosaic": [".nan", "7"],
        },
    ),
    (
        "rooms",
        ["--root=plans", "--num_train=1", "--num_val=1"],
        {"root": ["", "FILE"], "num_train": ["0", "-1", "nan"], "num_val": ["-1", "1.5"], "size": ["0", "-5", "nan"]},
    ),
    (
        "to_coco",
        ["--data.root=DATA", "--output=copy"],
        {"data.root": ["nowhere", "FILE"], "output": ["FILE", ""], "images": ["steal", ""]},
    ),
    ("weights", [], {"bogus": ["1"]}),
]


def with_places(text, place, rooms):
    for name, path in (("FILE", place / "file"), ("FOLDER", place / "folder")):
        text = text.replace(name, str(path))
    return text.replace("IMAGES", str(rooms / "val/images")).replace("DATA", str(rooms))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED_BY_OTHERS, ids=lambda case: case[0])
def test_odd_values_of_other_commands(case, place, rooms, capsys):
    command, needed, values = case
    wrong = {}
    for name, each in ((name, each) for name, several in values.items() for each in several):
        args = [argument for argument in needed if not argument.startswith(f"--{name}=")]
        args = [with_places(argument, place, rooms) for argument in [*args, f"--{name}={each}"]]
        code, said = outcome(run, [command, *args], capsys)
        if reason := complaint(code, said, True):
            wrong[f"--{name}={each}"] = reason
    assert not wrong


REFUSED_BY_LAUNCH = {
    "config": ["", "nowhere.yaml", "FILE"],
    "data": ["nowhere", "FILE"],
    "gpus": ["nan", "1.5"],
    "max-cost": ["0", "-5", "nan", "inf"],
    "max-run-hours": ["0", "-5", "nan", "inf"],
    "max-wait-hours": ["0", "nan"],
    "model.lr": ["-1"],
    "bogus": ["1"],
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_odd_values_of_launch(place, rooms, capsys):
    (place / "tiny.yaml").write_text("model: {backbone: resnet10, backbone_norm: group, backbone_weights: null}\n")
    wrong = {}
    for name, each in ((name, each) for name, several in REFUSED_BY_LAUNCH.items() for each in several):
        needed = ["--config=tiny.yaml", "--data=DATA", "--dry-run"]
        args = [argument for argument in needed if not argument.startswith(f"--{name}=")]
        args = [with_places(argument, place, rooms) for argument in [*args, f"--{name}={each}"]]
        code, said = outcome(launch.main, args, capsys)
        if reason := complaint(code, said, True):
            wrong[f"--{name}={each}"] = reason
    assert not wrong
