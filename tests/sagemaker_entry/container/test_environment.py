"""What the container is told: both generations of variables, the files alone, and channels of all kinds."""

import json
import shutil
from pathlib import Path

import pytest

from sagemaker_entry.container.channels import data_options, read_job
from sagemaker_entry.container.environment import read_environment
from sagemaker_entry.protocol.job import Job
from sagemaker_entry.protocol.problem import Problem


@pytest.fixture
def root(tmp_path):
    """An /opt/ml as SageMaker fills it."""
    for name in ("input/config", "input/data", "model", "output"):
        (tmp_path / name).mkdir(parents=True)
    write(
        tmp_path,
        "resourceconfig",
        {
            "current_host": "algo-2",
            "current_instance_type": "ml.g5.2xlarge",
            "hosts": ["algo-2", "algo-1"],
            "network_interface_name": "eth0",
        },
    )
    write(tmp_path, "inputdataconfig", {"training": {}, "code": {}, "sm_drivers": {}})
    write(tmp_path, "hyperparameters", {"trainer.max_epochs": "3", "model.lr": "1e-4", "config": '"a.yaml"'})
    write(tmp_path, "checkpointconfig", {"S3Uri": "s3://b/c", "LocalPath": "/elsewhere"})
    return tmp_path


def write(root, name, content):
    (root / "input" / "config" / f"{name}.json").write_text(
        content if isinstance(content, str) else json.dumps(content)
    )


def variables(root, **more):
    return {"SM_INPUT_DIR": str(root / "input"), **more}


def test_the_files_alone_are_enough(root):
    environment = read_environment(variables(root, TRAINING_JOB_NAME="my-job"))
    assert environment.job_name == "my-job"
    assert environment.hosts == ("algo-1", "algo-2")
    assert (environment.current_host, environment.rank, environment.leads) == ("algo-2", 1, False)
    assert environment.channels == {"training": root / "input" / "data" / "training"}
    assert environment.hyperparameters == {"trainer.max_epochs": 3, "model.lr": 1e-4, "config": "a.yaml"}
    assert environment.checkpoint_dir == Path("/elsewhere")
    assert environment.model_dir == root / "model"
    assert environment.failure_file == root / "output" / "failure"


def test_the_variables_of_the_v3_driver(root):
    environment = read_environment(
        variables(
            root,
            SM_HOSTS='["algo-1", "algo-2", "algo-3"]',
            SM_CURRENT_HOST="algo-1",
            SM_CHANNELS='["train", "validation", "code", "sm_drivers"]',
            SM_CHANNEL_TRAIN="/x/train",
            SM_HPS='{"trainer.max_epochs": 5}',
            SM_MODEL_DIR="/x/model",
            SM_OUTPUT_FAILURE="/x/failure",
            SM_NETWORK_INTERFACE_NAME="ens5",
        )
    )
    assert environment.hosts == ("algo-1", "algo-2", "algo-3")
    assert environment.leads
    assert environment.channels == {"train": Path("/x/train"), "validation": root / "input/data/validation"}
    assert environment.hyperparameters == {"trainer.max_epochs": 5}
    assert (str(environment.model_dir), str(environment.failure_file)) == ("/x/model", "/x/failure")
    assert environment.network_interface == "ens5"


def test_the_variables_of_the_v2_toolkit(root):
    environment = read_environment(
        variables(root, SM_HPS='{"trainer.max_epochs": 5, "sagemaker_program": "train.py"}', SM_USER_ARGS='["--x"]')
    )
    assert environment.hyperparameters == {"trainer.max_epochs": 5}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("resourceconfig", "{half", "resourceconfig.json is not valid JSON"),
        ("resourceconfig", "[1]", "should hold a JSON object"),
        ("resourceconfig", {"current_host": "algo-9", "hosts": ["algo-1"]}, "called 'algo-9'"),
    ],
)
def test_files_that_are_not_sagemakers(root, name, content, words):
    write(root, name, content)
    with pytest.raises(Problem, match=words):
        read_environment(variables(root))


def test_what_the_tuner_adds_is_no_option(root):
    write(root, "hyperparameters", {"model.lr": "0.0003", "_tuning_objective_metric": "val:F1"})
    assert read_environment(variables(root)).hyperparameters == {"model.lr": 0.0003}


# ------------------------------------------------------------------ channels


def channels(root, **folders):
    """An environment with these channels, each a copy of a folder (None: an empty one; "missing": not there)."""
    for name, folder in folders.items():
        target = root / "input" / "data" / name
        if folder is None:
            target.mkdir()
        elif folder != "missing":
            shutil.copytree(folder, target)
    write(root, "inputdataconfig", {name: {} for name in folders})
    return read_environment(variables(root))


def test_one_channel_with_everything(root, rooms, tmp_path):
    (option,) = data_options(channels(root, training=rooms), tmp_path / "scratch")
    assert option == f"--data.root={root / 'input/data/training'}"


def test_a_channel_for_each_split(root, rooms, tmp_path):
    from dino_lightning import CocoDataModule

    environment = channels(root, train=rooms / "train", validation=rooms / "val")
    options = dict(
        option.removeprefix("--data.").split("=") for option in data_options(environment, tmp_path / "scratch")
    )
    data = CocoDataModule(**options)
    assert (len(data.train_set), len(data.val_set)) == (8, 4)
    assert data.train_set[0].image.ndim == 3
    assert data.val_set[0].image.ndim == 3


def test_a_train_channel_alone_holds_some_images_out(root, rooms, tmp_path):
    from dino_lightning import CocoDataModule

    (option,) = data_options(channels(root, train=rooms / "train"), tmp_path / "scratch")
    data = CocoDataModule(root=option.partition("=")[2])
    assert (len(data.train_set), len(data.val_set)) == (7, 1)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        ({}, ["no channel 'training'", "channels found: none"]),
        ({"test": None}, ["no channel 'training'", "channels found: test"]),
        ({"training": None}, ["Channel 'training'", "is empty"]),
        ({"training": "missing"}, ["Channel 'training'", "does not exist"]),
        ({"train": None, "validation": None}, ["Channel 'train'", "is empty"]),
    ],
)
def test_channels_that_are_missing_or_empty(root, tmp_path, folders, words):
    with pytest.raises(Problem) as caught:
        data_options(channels(root, **folders), tmp_path / "scratch")
    for word in words:
        assert word in str(caught.value)


def test_a_split_without_its_annotation_file(root, rooms, tmp_path):
    environment = channels(root, train=rooms / "train", val=rooms / "val")
    (root / "input/data/val/annotations.json").rename(root / "input/data/val/one.json")
    assert f"--data.val_annotations={root / 'input/data/val/one.json'}" in data_options(environment, tmp_path)
    (root / "input/data/val/two.json").write_text("{}")
    with pytest.raises(Problem, match="2 JSON files"):
        data_options(environment, tmp_path)


# ------------------------------------------------------------------ the plan that comes along


def test_hyperparameters_are_options_where_no_plan_came_along(root):
    environment = channels(root)
    assert read_job(environment, []).arguments == ("--trainer.max_epochs=3", "--model.lr=0.0001", "--config=a.yaml")
    assert read_job(environment, ["--trainer.max_epochs", "4"]).arguments == ("--trainer.max_epochs", "4")


def test_the_plan_comes_as_files(root, tmp_path):
    folder = tmp_path / "plan"
    folder.mkdir()
    (folder / "config.yaml").write_text("trainer: {max_epochs: 1}")
    plan = Job(arguments=("--model.lr=1",), hosts=2, gpus_per_host=1, weights={"model.weights": "it's.pth"})
    (folder / "job.json").write_text(plan.to_json())
    weights = tmp_path / "weights"
    weights.mkdir()
    write(root, "hyperparameters", {})
    environment = channels(root, config=folder, weights=weights)
    job = read_job(environment, [])
    assert (job.hosts, job.gpus_per_host) == (2, 1)
    assert job.config == str(root / "input/data/config/config.yaml")
    file = f"--model.weights={root / 'input/data/weights'}/it's.pth"
    assert job.arguments == ("--model.lr=1", file)
    write(root, "hyperparameters", {"model.lr": "0.5"})  # as the tuner sets them
    assert read_job(read_environment(variables(root)), []).arguments == ("--model.lr=1", "--model.lr=0.5", file)
    with pytest.raises(Problem, match="no channel 'weights'"):
        shutil.rmtree(root / "input/data/config")
        read_job(channels(root, config=folder), [])
    (root / "input/data/config/config.yaml").unlink()
    with pytest.raises(Problem, match=r"config\.yaml is missing"):
        read_job(environment, [])
    (root / "input/data/config/job.json").write_text("{")
    with pytest.raises(Problem, match=r"job\.json cannot be read"):
        read_job(environment, [])
