"""The batch size that fits, and what is said when it did not: the real command line, real steps, a real allocator."""

import csv
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dino_lightning import DINOModule
from dino_lightning.__main__ import run
from dino_lightning.callbacks import auto_batch_size
from dino_lightning.callbacks.auto_batch_size import BatchSizePlan, MemoryProbe, largest_fitting
from dino_lightning.data.worst_case import blank_batch
from dino_lightning.errors import OutOfMemory
from dino_lightning.losses import Criterion
from dino_lightning.training import memory
from dino_lightning.training.memory import estimated_peak, is_out_of_memory, preserve_state, take_steps
from tests.conftest import TINY_ARGS, TINY_SIZES

TOO_MUCH = 10**15  # bytes; no allocator has them


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fit(rooms, folder, *more, epochs=1):
    """A run that must succeed; gives its losses, step by step, and what its checkpoint holds."""
    args = ["--data.root", str(rooms), "--run_dir", folder, f"--trainer.max_epochs={epochs}", *TINY_ARGS]
    assert run(["fit", *args, "--trainer.log_every_n_steps=1", *more]) == 0
    return losses(folder), checkpoint(folder)


def losses(folder):
    with Path(folder, "metrics.csv").open() as file:
        return {int(row["step"]): row["train/loss_step"] for row in csv.DictReader(file) if row["train/loss_step"]}


def checkpoint(folder):
    return torch.load(Path(folder, "checkpoints", "last.ckpt"), weights_only=True)


def real_steps(trainer, module):
    """As on a GPU: steps are taken; a batch of more than two images is said to be out of memory."""

    def measure(batch):
        take_steps(module.model, module.criterion, batch)
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return 1000 * len(batch)

    return MemoryProbe(10**9, "of a pretended GPU", measure)


# ---------------------------------------------------------------------- choosing


def test_a_run_is_the_same_as_with_the_chosen_sizes_by_hand(rooms, monkeypatch):
    by_hand, _ = fit(rooms, "hand", "--data.batch_size=2", "--trainer.accumulate_grad_batches=2")
    monkeypatch.setattr(auto_batch_size, "_host_probe", real_steps)
    chosen, saved = fit(rooms, "auto", "--auto_batch_size=4")
    assert len(chosen) >= 2
    assert chosen == by_hand
    assert saved["callbacks"]["AutoBatchSize"] == {
        "global_batch": 4,
        "processes": 1,
        "batch_size": 2,
        "accumulation": 2,
    }
    assert saved["global_step"] == 2


def test_probing_leaves_no_trace():
    """Not even in the running averages of batch norms."""
    module = DINOModule(num_classes=3, backbone_weights=None, **{**TINY_SIZES, "backbone_norm": "batch"})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    kept = torch.ones_like(module.model.level_embedding)
    module.model.level_embedding.grad = kept
    batch = blank_batch((64, 96), batch_size=2, num_boxes=3)

    def moved():  # as to another device: its buffers are others from then on
        module.model.double().float()
        for buffer in module.model.buffers():
            buffer.add_(1)

    probes = (
        lambda: take_steps(module.model, module.criterion, batch),
        lambda: estimated_peak(module.model, batch),
        moved,
    )
    for probe in probes:
        with preserve_state(module.model):
            probe()
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
        gradients = {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}
        assert list(gradients) == ["level_embedding"]
        assert gradients["level_embedding"] is kept


@pytest.mark.slow
def test_with_little_memory_the_batch_is_small_and_accumulated(rooms, monkeypatch):
    needs = {}

    def measured(model, batch):
        if len(batch) not in needs:
            needs[len(batch)] = estimated_peak(model, batch)
        return needs[len(batch)]

    monkeypatch.setattr(auto_batch_size, "estimated_peak", measured)
    _, saved = fit(rooms, "plenty", "--auto_batch_size=2")
    assert saved["callbacks"]["AutoBatchSize"]["batch_size"] == 2
    assert sorted(needs) == [1, 2]
    assert needs[1] < needs[2]
    monkeypatch.setattr(
        auto_batch_size, "available_memory", lambda: (needs[1] + needs[2]) / 2 / auto_batch_size.HOST_SHARE
    )
    _, saved = fit(rooms, "little", "--auto_batch_size=2")
    assert saved["callbacks"]["AutoBatchSize"]["batch_size"] == 1
    assert saved["callbacks"]["AutoBatchSize"]["accumulation"] == 2


@pytest.mark.slow
def test_a_resumed_run_keeps_its_batches(rooms, monkeypatch):
    def stopped(trainer, module):
        raise AssertionError("asked again")

    monkeypatch.setattr(auto_batch_size, "_host_probe", real_steps)
    whole, _ = fit(rooms, "whole", "--auto_batch_size=4", "--model.lr_drop_epochs=[9]", epochs=2)
    fit(rooms, "parts", "--auto_batch_size=4", "--model.lr_drop_epochs=[9]")
    monkeypatch.setattr(auto_batch_size, "_host_probe", stopped)
    assert run(["fit", "--ckpt_path", "parts/checkpoints/last.ckpt", "--trainer.max_epochs=2"]) == 0
    assert losses("parts") == whole
    assert checkpoint("parts")["callbacks"]["AutoBatchSize"]["batch_size"] == 2


@pytest.mark.slow
def test_another_global_batch_is_chosen_for_anew(rooms, monkeypatch):
    monkeypatch.setattr(auto_batch_size, "_host_probe", real_steps)
    fit(rooms, "run", "--auto_batch_size=4")
    args = ["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.max_epochs=2", "--auto_batch_size=1"]
    assert run(["fit", *args]) == 0
    assert checkpoint("run")["callbacks"]["AutoBatchSize"]["batch_size"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--auto_batch_size=4", "--trainer.accumulate_grad_batches=2"], "chooses the accumulation itself"),
        (["--auto_batch_size=0"], "auto_batch_size"),
    ],
)
def test_what_cannot_be_chosen_is_refused(rooms, capsys, options, words):
    assert run(["fit", "--data.root", str(rooms), *TINY_ARGS, *options]) in (1, 2)
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def gauge(limit, lost_at):
    def measure(batch):
        if len(batch) >= lost_at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 100 * len(batch)

    return MemoryProbe(limit, "pretended", measure)


@pytest.mark.parametrize(
    ("limit", "lost_at", "expected", "words"),
    [
        (10**6, 99, 8, "8 of the largest images"),
        (10**6, 5, 4, "8 do not fit"),
        (450, 99, 4, "8 would take"),
        (50, 99, 1, "may run out of memory"),
        (10**6, 1, 0, "Not even 1"),
    ],
)
def test_the_largest_that_fits_is_taken(limit, lost_at, expected, words):
    made = []

    def make(size):
        made.append(size)
        return blank_batch((32, 48), batch_size=size, num_boxes=2)

    fitting, reason = largest_fitting([1, 2, 4, 8], make, gauge(limit, lost_at))
    assert fitting == expected
    assert words in reason
    assert "32 x 48 pixels (height x width) with 2 boxes" in reason
    assert made == [1, 2, 4, 8][: len(made)]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(batch):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        largest_fitting([1], lambda size: blank_batch((8, 8), batch_size=1, num_boxes=1), MemoryProbe(1, "", broken))


def test_the_choice_is_said_with_what_could_not_be_had():
    assert "nearest below 5" in str(BatchSizePlan(global_batch=5, processes=2, batch_size=2, accumulation=1))
    said = str(BatchSizePlan(global_batch=12, processes=2, batch_size=2, accumulation=3))
    assert "2 for each process x 2 processes x 3 batches accumulated, a global batch of 12" in said
    assert "nearest" not in said


@pytest.mark.gpu
def test_a_gpu_is_tried_out_and_the_run_is_the_same_as_by_hand(rooms, caplog):
    on_gpu = ["--trainer.accelerator=gpu", "--trainer.devices=1", "--trainer.precision=32-true"]
    by_hand, _ = fit(rooms, "hand", "--data.batch_size=4", *on_gpu)
    chosen, saved = fit(rooms, "auto", "--auto_batch_size=4", *on_gpu)
    assert saved["callbacks"]["AutoBatchSize"]["batch_size"] == 4
    assert "90% of the memory of cuda:0" in caplog.text
    first = min(by_hand)
    assert chosen[first] == by_hand[first]  # later ones may differ by the order of additions


@pytest.mark.slow
def test_two_processes_agree(rooms, tmp_path):
    """Each has an equal share of the wanted batch; neither waits for the other's losses while it probes."""
    command = [sys.executable, "-m", "dino_lightning.fit", "--data.root", str(rooms), *TINY_ARGS]
    command += ["--trainer.max_epochs=1", "--trainer.devices=2", "--trainer.strategy=ddp", "--auto_batch_size=5"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("nearest below 5") == 1
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert checkpoint(run_dir)["callbacks"]["AutoBatchSize"]["batch_size"] == 2


# ---------------------------------------------------------------------- estimating

MEASURE = textwrap.dedent(
    """
    import json, sys, torch
    from pathlib import Path
    from dino_lightning import DINOModule
    from dino_lightning.data.worst_case import blank_batch
    from dino_lightning.training.memory import estimated_peak, take_steps

    def resident(name):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) * 1024

    torch.set_num_threads(1)
    module = DINOModule(num_classes=3, backbone_weights=None, **json.loads(sys.argv[1]))
    take_steps(module.model, module.criterion, blank_batch((64, 96), batch_size=1, num_boxes=1))  # loads libraries
    batch = blank_batch((320, 480), batch_size=int(sys.argv[2]), num_boxes=20)
    estimate = estimated_peak(module.model, batch)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    take_steps(module.model, module.criterion, batch)
    print(json.dumps([estimate, resident("VmHWM") - before]))
    """
)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure")
def test_the_estimate_comes_close_to_what_is_taken():
    command = [sys.executable, "-c", MEASURE, json.dumps(TINY_SIZES), "24"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    estimate, taken = json.loads(done.stdout)
    assert taken > 8e8
    assert 0.8 < estimate / taken < 1.25


@pytest.mark.slow
def test_computing_the_encoder_again_is_estimated_to_take_less():
    batch = blank_batch((640, 960), batch_size=8, num_boxes=5)
    needs = []
    for recompute in (False, True):
        sizes = {**TINY_SIZES, "num_encoder_layers": 4, "recompute_encoder": recompute}
        module = DINOModule(num_classes=3, backbone_weights=None, **sizes)
        needs.append(estimated_peak(module.model, batch))
    assert needs[1] < 0.9 * needs[0]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("1000", 1000 - 600 + 250), ("max", None), ("500", 500 - 600 + 250), ("100", 0)],
)
def test_a_containers_limit_counts(tmp_path, limit, expected):
    (tmp_path / "limit").write_text(f"{limit}\n")
    (tmp_path / "usage").write_text("600\n")
    (tmp_path / "stat").write_text("anon 300\ninactive_file 250\nactive_file 9\n")
    left = memory._left_in_group(tmp_path / "limit", tmp_path / "usage", tmp_path / "stat")
    assert left == expected
    assert memory._left_in_group(tmp_path / "none", tmp_path / "usage", tmp_path / "stat") is None
    assert memory.available_memory() > 0


def test_the_worst_count_of_boxes_is_the_one_with_the_most_denoising_queries():
    assert memory.worst_box_count(63, 100) == 50
    assert memory.denoising_queries(100, 50) == 200
    assert memory.denoising_queries(100, 63) == 126
    assert memory.worst_box_count(300, 100) == 300
    assert memory.worst_box_count(0, 100) == 0
    assert memory.worst_box_count(7, 0) == 7
    assert (memory.worst_box_count(20, 12), memory.worst_box_count(20, 12, "published")) == (20, 20)
    assert (memory.denoising_queries(12, 20), memory.denoising_queries(12, 20, "published")) == (40, 960)


# ---------------------------------------------------------------------- running out of it


def hungry(self, output, targets, image_ids=None, **more):
    return {"loss": torch.empty(TOO_MUCH, dtype=torch.uint8).sum()}


def test_the_allocators_own_error_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(TOO_MUCH, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_running_out_of_memory_in_training_ends_in_one_sentence(rooms, monkeypatch, capsys):
    monkeypatch.setattr(Criterion, "forward", hungry)
    args = ["--data.root", str(rooms), *TINY_ARGS, "--data.batch_size=2", "--trainer.num_sanity_val_steps=0"]
    assert run(["fit", *args]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "batch 1 of training epoch 1" in error
    assert "2 images on a canvas of " in error
    assert "boxes" in error
    assert "denoising queries" in error
    for remedy in ("--auto_batch_size 2", "--model.recompute_encoder true", "--data.max_size"):
        assert remedy in error


def test_remedies_in_use_are_not_proposed_again(rooms, monkeypatch, capsys):
    monkeypatch.setattr(auto_batch_size, "_host_probe", lambda *_: MemoryProbe(10**9, "", lambda batch: 1))
    monkeypatch.setattr(Criterion, "forward", hungry)
    args = ["--data.root", str(rooms), *TINY_ARGS, "--auto_batch_size=2", "--model.recompute_encoder=true"]
    assert run(["fit", *args, "--trainer.num_sanity_val_steps=0"]) == 1
    error = capsys.readouterr().err
    assert "--data.batch_size 1 with --trainer.accumulate_grad_batches 2 in place of --auto_batch_size" in error
    assert "recompute_encoder" not in error


def test_running_out_of_memory_in_validation_names_its_batch(rooms, monkeypatch, capsys):
    monkeypatch.setattr(Criterion, "forward", hungry)
    together = ["--data.val_batch_size=2", "--data.fixed_size=64", "--data.fixed_size_mode=stretch"]  # of one shape
    assert run(["fit", "--data.root", str(rooms), *TINY_ARGS, *together]) == 1
    error = capsys.readouterr().err
    assert "batch 1 of the validation" in error
    assert "--data.val_batch_size 1" in error
    assert "accumulate" not in error


def test_nothing_that_fits_ends_in_one_sentence(rooms, monkeypatch, capsys):
    def lost(batch):
        return torch.empty(TOO_MUCH, dtype=torch.uint8)

    monkeypatch.setattr(auto_batch_size, "_host_probe", lambda *_: MemoryProbe(1, "", lost))
    assert run(["fit", "--data.root", str(rooms), *TINY_ARGS, "--auto_batch_size=4"]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "Not even 1 of the largest images of" in error
    assert issubclass(OutOfMemory, RuntimeError)
