"""The container's entry on this machine: what it leaves, how it stops, and what it says when something is wrong."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from dino_lightning import load_detector
from dino_lightning.floor_plans import write_rooms_dataset
from sagemaker_entry import launch, train
from sagemaker_entry.container.callbacks import ProgressLines
from sagemaker_entry.container.environment import STRAY, child_environment, read_environment
from sagemaker_entry.container.failure import Failure, first_cause
from sagemaker_entry.laptop.local_run import prepare_opt_ml
from sagemaker_entry.protocol.job import Job
from sagemaker_entry.protocol.trial import TRIAL_FILE, read_measured
from sagemaker_entry.train import write_model
from tests.sagemaker_entry.conftest import TINY_CONFIG

PROJECT = Path(launch.__file__).parent.parent


class Container:
    """The entry, started on a folder laid out like /opt/ml."""

    def __init__(self, root, folder=None, arguments=(), **variables):
        self.root = root
        kept = {name: value for name, value in os.environ.items() if name not in STRAY and not name.startswith("SM_")}
        environment = {**kept, "SM_INPUT_DIR": str(root / "input"), "TRAINING_JOB_NAME": "job", "OMP_NUM_THREADS": "1"}
        self.log = root / "log.txt"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sagemaker_entry.train", *arguments],
                env={**environment, **variables},
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout=200):
        return self.process.wait(timeout)

    def wait_for(self, words):
        deadline = time.monotonic() + 120
        while words not in self.text:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text[-3000:]
            time.sleep(0.05)

    @property
    def text(self):
        return self.log.read_text()

    @property
    def failure(self):
        path = self.root / "output" / "failure"
        return path.read_text() if path.exists() else None


def config(**trainer):
    return yaml.safe_dump({**TINY_CONFIG, "trainer": {**TINY_CONFIG["trainer"], **trainer}})


def losses(root):
    with (root / "checkpoints" / "metrics.csv").open() as file:
        return {int(row["step"]): row["train/loss_step"] for row in csv.DictReader(file) if row["train/loss_step"]}


@pytest.fixture(scope="module")
def local_run(rooms, tmp_path_factory):
    """`launch --local`, run once; the folder that stands for /opt/ml."""
    folder = tmp_path_factory.mktemp("local")
    file = folder / "tiny's.yaml"
    file.write_text(config())
    root = folder / "opt ml"
    command = ["--config", str(file), "--data", str(rooms), "--local", "--local-dir", str(root), "--model.lr=0.0003"]
    options_of_fit = ["--ema_decay", "0.9", "--early_stopping_patience=5", "--optimizer", "AdamW"]
    assert launch.main([*command, *options_of_fit]) == 0
    return root


# ------------------------------------------------------------------ success


@pytest.mark.slow
def test_a_local_run_leaves_a_model_that_can_be_used_alone(local_run, rooms):
    model = local_run / "model"
    assert {"model.ckpt", "model.json", "config.yaml", "metrics.csv", "detections.png", "code"} <= {
        path.name for path in model.iterdir()
    }
    assert not list(model.glob(".*"))
    description = json.loads((model / "model.json").read_text())
    assert description["complete"] is True
    assert description["classes"] == [{"label": 0, "category_id": 1, "name": "room"}]
    assert description["preprocessing"]["short_side"] == 64
    with (model / "metrics.csv").open() as file:
        evaluated = {int(row["epoch"]): row for row in csv.DictReader(file) if row["val/AP"]}
    assert set(evaluated) == {0, 1}
    expected = evaluated[description["epoch"] - 1]  # of the epoch whose weights these are
    assert description["metrics"]["val/loss"] == float(expected["val/loss"])
    assert description["metrics"]["val/AP"] == max(float(row["val/AP"]) for row in evaluated.values())
    content = torch.load(model / "model.ckpt", weights_only=True)
    assert "optimizer_states" not in content
    assert content["hyper_parameters"]["lr"] == 0.0003
    assert sum(path.stat().st_size for path in model.rglob("*") if path.is_file()) < 20e6
    detector = load_detector(model / "model.ckpt")
    best = load_detector(local_run / "checkpoints" / "checkpoints" / "best.ckpt")
    for name, value in best.module.state_dict().items():
        assert torch.equal(value, detector.module.state_dict()[name])
    picture = rooms / "val" / "images" / "000001.png"
    (found,) = detector.detect([picture], threshold=0.0)
    assert found.category_ids == (1,) and len(found) > 0
    assert not (local_run / "output" / "failure").exists()


@pytest.mark.slow
def test_options_of_fit_reach_the_container(local_run):
    options = yaml.safe_load((local_run / "model" / "config.yaml").read_text())
    assert (options["ema_decay"], options["early_stopping_patience"]) == (0.9, 5)
    assert options["optimizer"]["class_path"] == "torch.optim.AdamW"
    last = torch.load(local_run / "checkpoints" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {"EMA", "EarlyStopping"} <= {name.partition("{")[0] for name in last["callbacks"]}


@pytest.mark.slow
def test_a_finished_run_started_again_has_nothing_to_do_and_loses_nothing(local_run):
    before = losses(local_run)
    container = Container(local_run)
    assert container.wait() == 0, container.text[-2000:]
    assert "resuming from the checkpoint" in container.text
    assert losses(local_run) == before
    assert (local_run / "model" / "model.json").is_file()


@pytest.mark.slow
def test_a_trial_measures_and_leaves_the_model_of_the_run_alone(local_run, rooms, capfd):
    before = {path: path.stat().st_mtime_ns for path in [*(local_run / "model").rglob("*"), *local_run.rglob("*.ckpt")]}
    command = ["--config", str(local_run.parent / "tiny's.yaml"), "--data", str(rooms), "--local", "--trial"]
    assert launch.main([*command, "--local-dir", str(local_run), "--trainer.max_epochs=30"]) == 0
    measured = read_measured((local_run / "checkpoints" / TRIAL_FILE).read_text())
    assert measured.batches >= 20 and measured.val_images > 0
    assert 0 < measured.seconds_per_batch < measured.seconds_to_start
    assert 0 <= measured.waiting <= 1 and 0 < measured.memory_used < measured.memory_total
    said = capfd.readouterr().out
    assert "[dino] trial: " in said and "seconds a step of 2 images" in said
    assert "The whole training on this machine" in said and "model written" not in said
    after = {path: path.stat().st_mtime_ns for path in [*(local_run / "model").rglob("*"), *local_run.rglob("*.ckpt")]}
    assert after == before


def test_help_starts_nothing(capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert train.main(["--help"], {}) == 0
    printed = capsys.readouterr().out
    assert "python -m sagemaker_entry.train" in printed and "error" not in printed
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------ stopping


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["epoch", "validation"])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(tmp_path, moment):
    # Enough steps that the signal falls into the middle of an epoch; or one alone, so that it is the validation that
    # notices, for after the last step of an epoch nobody asks.
    plans = write_rooms_dataset(tmp_path / "plans", num_train=40 if moment == "epoch" else 2, num_val=40, size=128)
    roots = [tmp_path / "whole", tmp_path / "parts"]
    for root in roots:
        prepare_opt_ml(root, plans, config(max_epochs=2), Job(hosts=1, gpus_per_host=0), {})
    whole = Container(roots[0])
    assert whole.wait() == 0, whole.text[-3000:]

    parts = Container(roots[1])
    parts.wait_for("epoch=1 epochs=2 batch 1")
    began = time.monotonic()
    parts.process.send_signal(signal.SIGTERM)
    assert parts.wait() == 143, parts.text[-3000:]
    assert time.monotonic() - began < 100
    assert parts.failure is None
    step = int(parts.text.split("checkpoint of step ")[1].split()[0])
    if moment == "epoch":
        assert 0 < step < 20
        assert not (roots[1] / "model" / "model.json").exists()  # nothing was evaluated yet
    else:
        assert step == 1
    assert Container(roots[1]).wait() == 0
    expected, got = losses(roots[0]), losses(roots[1])
    assert set(expected) - set(got) <= {step - 1}
    assert got == {number: expected[number] for number in got}
    metrics = [json.loads((root / "model" / "model.json").read_text())["metrics"] for root in roots]
    assert metrics[0] == metrics[1]


def test_a_stop_while_requirements_are_installed(tmp_path, rooms):
    prepare_opt_ml(tmp_path / "ml", rooms, config(), Job(hosts=1, gpus_per_host=0), {})
    (tmp_path / "requirements.txt").write_text("dino-lightning-needs-this-too\n")
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes the call and never answers
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        container = Container(tmp_path / "ml", folder=tmp_path, PIP_INDEX_URL=address, PYTHONPATH=str(PROJECT))
        index.accept()
        began = time.monotonic()
        container.process.send_signal(signal.SIGTERM)
        assert container.wait(60) == 143
    assert time.monotonic() - began < 30
    assert "stopped before training began" in container.text
    assert container.failure is None


def test_lines_of_an_epoch_without_evaluation_do_not_repeat_the_last_one(capsys):
    callback = ProgressLines()
    metrics = {"train/loss_epoch": torch.tensor(2.0), "val/F1": torch.tensor(0.5)}
    trainer = SimpleNamespace(
        is_global_zero=True, callback_metrics=metrics, current_epoch=0, max_epochs=4, sanity_checking=False
    )
    callback.on_validation_end(trainer, None)
    callback.on_train_epoch_end(trainer, None)
    callback.on_train_epoch_end(trainer, None)
    first, second = capsys.readouterr().out.splitlines()
    assert "val_F1=0.5000" in first and "val_F1" not in second
    assert "train_loss=2.0000" in second


def test_the_best_metrics_are_told_with_each_evaluation_also_of_a_resumed_run(tmp_path, capsys):
    file = tmp_path / "metrics.csv"
    file.write_text("epoch,step,val/AP,val/F1\n0,1,0.3,\n0,2,,\n1,3,0.7,nan\n2,4,0.1,0.2\n3,5,0.9x")
    callback = ProgressLines(file)
    metrics = {"val/AP": torch.tensor(0.5), "val/F1": torch.tensor(0.4)}
    trainer = SimpleNamespace(
        is_global_zero=True, callback_metrics=metrics, current_epoch=4, max_epochs=9, sanity_checking=False
    )
    for f1 in (0.4, 0.3):
        metrics["val/F1"] = torch.tensor(f1)
        callback.on_validation_end(trainer, None)
        callback.on_train_epoch_end(trainer, None)
    callback.on_train_epoch_end(trainer, None)
    first, second, unevaluated = capsys.readouterr().out.splitlines()
    assert first.endswith("val_AP=0.5000 val_F1=0.4000 best_AP=0.7000 best_F1=0.4000")
    assert second.endswith("val_F1=0.3000 best_AP=0.7000 best_F1=0.4000")
    assert "best" not in unevaluated


@pytest.mark.slow
def test_a_model_of_a_stopped_run_says_so(local_run, tmp_path):
    assert write_model(local_run / "checkpoints", tmp_path / "model", complete=False)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["complete"] is False
    assert write_model(tmp_path / "nothing", tmp_path / "other", complete=True) is False
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------ failing


def damaged(rooms, folder):
    import shutil

    shutil.copytree(rooms, folder)
    for path in (folder / "train" / "images").iterdir():
        path.write_bytes(b"\x89PNG nonsense")
    return folder


@pytest.mark.parametrize(
    ("case", "words"),
    [
        pytest.param("image", ["[algo-1, process 0] Image ", "cannot be decoded"], marks=pytest.mark.slow),
        pytest.param("config", ["Did you mean --model.num_queries?"], marks=pytest.mark.slow),
        ("gpus", ["1 GPUs were planned", "PyTorch sees 0"]),
        ("hosts", ["plan was for 2 hosts", "runs on 1"]),
        ("nested", ["starts torchrun itself"]),
        ("waiting", ["[algo-1] Training did not begin within 1 seconds: 2 processes on one host"]),
    ],
)
def test_a_failure_is_one_sentence_in_the_failure_file(tmp_path, rooms, case, words):
    root = tmp_path / "ml"
    data = damaged(rooms, tmp_path / "data") if case == "image" else rooms
    text = config() if case != "config" else config() + "\nmodel: {nun_queries: 3}\n"
    if case == "config":
        text = yaml.safe_dump({**TINY_CONFIG, "model": {"nun_queries": 3}})
    plan = Job(hosts=2 if case == "hosts" else 1, gpus_per_host=1 if case == "gpus" else 0)
    prepare_opt_ml(root, data, text, plan, {})
    variables = {
        "nested": {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0"},
        "waiting": {"DINO_SECONDS_TO_MEET": "1", "DINO_CPU_PROCESSES": "2"},
    }.get(case, {})
    container = Container(root, **variables)
    assert container.wait() == 1
    assert len(container.failure.splitlines()) == 1
    for word in words:
        assert word in container.failure
    assert f"error: {container.failure.strip()}" in container.text  # the older toolkit takes the last line it sees
    assert not list((root / "model").iterdir())


@pytest.mark.slow
def test_a_package_index_out_of_reach_is_in_the_failure_file(tmp_path, rooms):
    prepare_opt_ml(tmp_path / "ml", rooms, config(), Job(hosts=1, gpus_per_host=0), {})
    (tmp_path / "requirements.txt").write_text("dino-lightning-needs-this-too\n")
    closed = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PATH": ""}  # without uv
    container = Container(tmp_path / "ml", folder=tmp_path, PYTHONPATH=str(PROJECT), **closed)
    assert container.wait() == 1
    assert container.failure.startswith("[algo-1] pip could not reach the package index (")
    assert len(container.failure.splitlines()) == 1


@pytest.mark.slow
def test_a_job_without_a_network_installs_what_came_along_and_nothing_else(tmp_path, rooms):
    root = tmp_path / "ml"
    prepare_opt_ml(root, rooms, config(), Job(hosts=1, gpus_per_host=0), {})
    (root / "input" / "data" / "packages").mkdir()
    channels = {name: {} for name in ("training", "config", "packages")}
    (root / "input" / "config" / "inputdataconfig.json").write_text(json.dumps(channels))
    (tmp_path / "requirements.txt").write_text("dino-lightning-needs-this-too\n")
    container = Container(root, folder=tmp_path, PYTHONPATH=str(PROJECT), PATH="")
    assert container.wait() == 1
    assert container.failure.startswith("[algo-1] pip could not install the packages that came with the job (")
    assert re.search(rf"Looking in links: .*{re.escape(str(root / 'input' / 'data' / 'packages'))}", container.text)
    assert "Looking in indexes" not in container.text


@pytest.mark.slow
def test_a_job_of_the_tuner_in_an_image_of_its_own(tmp_path, rooms):
    """SageMaker starts such an image with the argument `train`, and the values are hyperparameters."""
    prepare_opt_ml(tmp_path, rooms, config(), Job(hosts=1, gpus_per_host=0), {})
    values = {"trainer.max_epochs": "1", "_tuning_objective_metric": "val:F1"}
    (tmp_path / "input" / "config" / "hyperparameters.json").write_text(json.dumps(values))
    container = Container(tmp_path, arguments=["train"])
    assert container.wait() == 0, container.text
    assert "epoch=1 epochs=1 finished" in container.text


@pytest.mark.slow
def test_a_process_that_is_killed_is_named(tmp_path, rooms):
    prepare_opt_ml(tmp_path, rooms, config(max_epochs=500), Job(hosts=1, gpus_per_host=0), {})
    kernel = tmp_path / "checkpoints" / "kernels" / "algo-1" / "triton" / "K" / "forward.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("{}")  # of a start before this one, which saved no checkpoint
    container = Container(tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "mine"))
    container.wait_for("epoch=1 epochs=500")
    workers = [
        process
        for process in psutil.Process(container.process.pid).children(recursive=True)
        if "sagemaker_entry.container.worker" in process.cmdline()
        and "sagemaker_entry.container.torchrun" not in process.cmdline()
    ]
    given = workers[-1].environ()
    workers[-1].kill()
    assert given["TRITON_CACHE_DIR"] == str(kernel.parents[1])
    assert given["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert "resuming" not in container.text and kernel.read_text() == "{}"
    assert container.wait(60) == 1
    assert "killed (SIGKILL)" in container.failure
    assert "out of memory" in container.failure


def test_stray_rank_variables_do_not_reach_the_training(tmp_path):
    stray = {"RANK": "3", "NODE_RANK": "7", "WORLD_SIZE": "9", "MASTER_ADDR": "x", "SLURM_NTASKS": "4", "KEPT": "yes"}
    environ = {**stray, "SM_INPUT_DIR": str(tmp_path / "input"), "SM_HOSTS": '["algo-1", "algo-2"]',
               "SM_CURRENT_HOST": "algo-1", "SM_NETWORK_INTERFACE_NAME": "lo"}  # fmt: skip
    child = child_environment(environ, read_environment(environ), str(tmp_path))
    assert not (set(stray) - {"KEPT"}) & set(child)
    assert child["KEPT"] == "yes"
    assert child["NCCL_HOSTID"] == "algo-1"  # the host names are all "aws"
    assert child["NCCL_SOCKET_IFNAME"] == child["GLOO_SOCKET_IFNAME"] == "lo"


def test_each_host_keeps_its_compiled_kernels_in_a_folder_of_its_own(tmp_path):
    """SageMaker copies the checkpoint folders of all hosts to one place."""
    hosts = {"SM_INPUT_DIR": str(tmp_path / "input"), "SM_HOSTS": '["algo-1", "algo-2"]'}
    for host in ("algo-1", "algo-2"):
        environ = {**hosts, "SM_CURRENT_HOST": host}
        child = child_environment(environ, read_environment(environ), str(tmp_path))
        assert child["TRITON_CACHE_DIR"] == str(tmp_path / "kernels" / host / "triton")
        assert child["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels" / host / "inductor")
        given = {**environ, "TRITON_CACHE_DIR": "/cache"}
        assert child_environment(given, read_environment(given), str(tmp_path))["TRITON_CACHE_DIR"] == "/cache"


def test_the_first_cause_is_told_not_what_follows_from_it():
    reset = Failure.of("RuntimeError: gloo: Connection closed by peer", host="algo-1", rank=0)
    out_of_memory = Failure.of("The GPU ran out of memory.", host="algo-2", rank=1)
    later = Failure("Host algo-2 has not been heard of", host="algo-1")
    assert reset.secondary and not out_of_memory.secondary
    assert first_cause([reset, later, out_of_memory]) is out_of_memory
    assert first_cause([]) is None
    assert out_of_memory.sentence == "[algo-2, process 1] The GPU ran out of memory."
    assert len(Failure("x" * 5000, host="a").sentence) <= 1024


@pytest.mark.parametrize("rank", [0, 1])
def test_hosts_tell_each_other_how_they_ended(rank):
    from sagemaker_entry.container.peers import Peers

    port = 21000 + os.getpid() % 10000 + rank
    names = ("localhost", "127.0.0.1")
    both = [Peers(names, index, port=port, patience=5, start_patience=10) for index in (0, 1)]
    for peers in both:
        peers.start()
    failure = Failure("It broke.", host=names[rank])
    time.sleep(2)
    assert both[0].remote_failure() is None and both[1].remote_failure() is None
    import threading

    leaving = threading.Thread(target=both[rank].leave, args=(failure,))
    leaving.start()
    found = both[1 - rank].wait_for_remote_failure()
    assert found == failure
    both[1 - rank].leave(None)
    leaving.join(20)
    assert not leaving.is_alive()


def test_the_leading_host_that_cannot_be_reached_is_named():
    from sagemaker_entry.container.peers import Peers

    peers = Peers(("127.0.0.1", "algo-2"), 1, port=9, patience=2, start_patience=1)
    peers.start()
    found = peers.wait_for_remote_failure()
    assert "cannot reach 127.0.0.1 at port 9" in found.message
    assert "security group" in found.message
