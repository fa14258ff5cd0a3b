"""Loaders continue when processes die and files vanish."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_lightning import CocoDataModule
from dino_lightning.data import loading
from dino_lightning.data.dataset import CocoDetection
from dino_lightning.data.loading import NO_GUARD
from dino_lightning.data.sampling import TrainSampler
from dino_lightning.errors import DataError
from dino_lightning.metrics import CocoMetric
from tests.data.small_coco import write_split
from tests.data.test_datamodule import Recorder, quiet_trainer

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path):
    write_split(tmp_path / "train.json", tmp_path / "images", count=20)
    write_split(tmp_path / "val.json", tmp_path / "images", count=9, first_id=101)
    return tmp_path


def data_module(root, **more):
    options = {"image_size": 32, "max_size": 64, "num_workers": 2, "batch_size": 2, "val_batch_size": 1, **more}
    return CocoDataModule(root=str(root), **options)


def worker_ids(loader):
    return [worker.pid for worker in loader._iterator._workers]


# --- a worker killed ---


@pytest.mark.parametrize("training", [True, False])
def test_no_batch_is_lost_when_a_worker_is_killed(root, training):
    batches = {}
    for kill in (False, True):
        torch.manual_seed(3)
        data = data_module(root, augmentation="plans")
        loader = data.train_dataloader() if training else data.val_dataloader()
        batches[kill] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for epoch in range(2):
                for number, batch in enumerate(loader):
                    batches[kill].append(batch)
                    if kill and number == 0:
                        # one that dies holding this lock of PyTorch's is the next test's
                        with loader._iterator._workers_done_event.event._cond:
                            os.kill(worker_ids(loader)[epoch], signal.SIGKILL)
        told = [str(warning.message) for warning in caught if "are restarted" in str(warning.message)]
        assert len(told) == (2 if kill else 0)
    assert len(batches[True]) == len(batches[False])
    for one, other in zip(batches[False], batches[True], strict=True):
        assert one.image_ids == other.image_ids and torch.equal(one.images, other.images)


class KilledWithLock(CocoDetection):
    """The first process that reads image 5 is killed while it looks whether the end was signalled."""

    def __getitem__(self, index):
        number = index if isinstance(index, int) else index[0]
        if number == 4 and not self.once.exists():
            self.once.touch()
            (end,) = (part for part in multiprocessing.current_process()._args if isinstance(part, Event))
            end._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.slow
def test_a_worker_killed_with_the_lock_of_all_others_neither_loses_a_batch_nor_hangs(root, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "LOCK_PATIENCE", 0.5)
    data = data_module(root)
    data.train_set.__class__ = KilledWithLock
    data.train_set.once = tmp_path / "killed"
    loader = data.train_dataloader()
    with pytest.warns(UserWarning, match="A loader process was killed.*no batch is lost"):
        for _ in range(2):
            assert sorted(number for batch in loader for number in batch.image_ids) == list(range(1, 21))
    assert (tmp_path / "killed").exists()


@pytest.mark.slow
def test_a_worker_killed_with_the_lock_after_the_epoch_does_not_hang_the_end(root, monkeypatch):
    monkeypatch.setattr(loading, "LOCK_PATIENCE", 0.5)
    loader = data_module(root).val_dataloader()
    assert len(list(loader)) == 9
    workers = list(loader._iterator._workers)
    loader._iterator._workers_done_event.event._cond.acquire()  # as one that is killed with it leaves it
    workers[0].kill()
    loader._iterator = None  # as at the end of a run
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.timeout(60)
def test_processes_of_an_iterator_that_the_garbage_collector_finds_end_at_once(root, monkeypatch):
    loader = data_module(root).val_dataloader()
    assert len(next(iter(loader))) == 1
    workers = list(loader._iterator._workers)
    gc.collect()
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 300)  # seconds that PyTorch would wait
    loader.itself = loader  # as where a traceback keeps it
    del loader
    assert all(worker.is_alive() for worker in workers)
    gc.collect()
    assert not any(worker.is_alive() for worker in workers)


class KilledNow(Recorder):
    """Kills a loader process in the middle of a training step: torch's own handler would end the step with an error."""

    def training_step(self, batch, number):
        if number == 1:
            os.kill(worker_ids(self.trainer.train_dataloader)[0], signal.SIGKILL)
            torch.zeros(2_000_000).exp().sum().item()  # time for the signal to arrive
        return super().training_step(batch, number)


@pytest.mark.filterwarnings("ignore:.*are restarted")
def test_a_worker_killed_in_a_training_step_does_not_end_the_run(root, tmp_path):
    module = KilledNow()
    quiet_trainer(tmp_path).fit(module, data_module(root))
    assert sorted(module.seen["train"]) == sorted(list(range(1, 21)) * 2)


class Killer(CocoDetection):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*are restarted")
def test_workers_that_are_killed_again_and_again_end_the_run_in_a_sentence(root):
    data = data_module(root)
    data.train_set.__class__ = Killer
    with pytest.raises(DataError, match=r"killed 4 times in one epoch.*Lower data\.num_workers"):
        list(data.train_dataloader())


UNGUARDED = """
import multiprocessing, sys
import lightning
from dino_lightning import CocoDataModule, DINOModule

multiprocessing.set_start_method("spawn", force=True)
data = CocoDataModule(root=sys.argv[1], image_size=32, max_size=64, num_workers=2)
print("script runs", flush=True)
model = DINOModule(num_classes=data.num_classes, backbone="resnet10", backbone_norm="group", backbone_weights=None)
lightning.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False).fit(model, data)
"""


@pytest.mark.slow
def test_a_script_that_starts_itself_in_each_loader_process_is_told_of_the_guard(root, tmp_path):
    """As scripts without `if __name__ == "__main__":` do where processes are spawned, on macOS and Windows."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, str(tmp_path / "script.py"), str(root)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 1
    assert done.stderr.count("The loader processes cannot start: on this system each of them imports your script") == 1
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]
    assert "are restarted" not in done.stderr
    assert done.stdout.count("script runs") <= 3  # once in each process


def test_a_process_that_ends_by_itself_while_it_starts_is_not_started_again(root):
    """Where processes are spawned, an error of the script ends them; a killed one has a negative exit code."""
    loader = data_module(root).train_dataloader()
    for method, exit_codes, cannot in (
        ("spawn", [1, None], True), ("spawn", [NO_GUARD], True), ("spawn", [], True), ("forkserver", [1], True),
        ("spawn", [-9, None], False), ("fork", [1], False), ("fork", [], False),
    ):  # fmt: skip
        loader.multiprocessing_context = method
        loader._processes = [SimpleNamespace(exitcode=code) for code in exit_codes]
        assert loader._cannot_start() == cannot, (method, exit_codes)


# --- a file removed between epochs ---


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_removed_between_epochs_is_counted_and_never_replaced_by_another_image(root, workers):
    data = data_module(root, on_bad_image="skip", num_workers=workers, augmentation="flips")
    loader = data.train_dataloader()
    before = [data.on_before_batch_transfer(batch, 0) for batch in loader]
    (root / "images/3.png").unlink()
    (root / "images/5.png").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"Image [35] of .*An empty page takes its place") as caught:
        after = [data.on_before_batch_transfer(batch, 0) for batch in loader]
    assert len(caught) == 1
    assert len(after) == len(before)
    assert sorted(i for batch in after for i in batch.image_ids) == list(range(1, 21))
    for batch in after:
        for index, image_id in enumerate(batch.image_ids):
            height, width = batch.image_sizes[index]
            blank = bool((batch.images[index, :, :height, :width] == 255).all())
            assert blank == (image_id in (3, 5))
            assert batch.targets.num_boxes[index] == (0 if blank else 2)
    with pytest.warns(UserWarning, match="2 times an image could not be read"):
        data.teardown("fit")


def test_a_removed_file_stops_the_run_where_that_was_asked_for(root):
    data = data_module(root, num_workers=0)
    list(data.train_dataloader())
    (root / "images/3.png").unlink()
    with pytest.raises(DataError, match=r"Image 3 of .*3\.png does not exist.*on_bad_image=skip"):
        list(data.train_dataloader())


def test_an_image_gone_counts_for_nothing_in_evaluation(root):
    """The metric of the others is what it is without the image, whatever is detected on the empty page."""
    data = data_module(root, on_bad_image="skip", num_workers=0)
    loader = data.val_dataloader()
    results = []
    for gone in (False, True):
        if gone:
            (root / "images/102.png").unlink()
        metric = CocoMetric(class_names=data.class_names)
        for batch in loader:
            for truth, image_id in zip(batch.ground_truth, batch.image_ids, strict=True):
                if image_id == 102 and not gone:
                    continue
                boxes = truth.boxes_xyxy + (0.0 if image_id == 101 else 1.5)
                scores = torch.linspace(0.9, 0.4, len(boxes))
                metric.update([detections(boxes, scores, truth.labels)], [truth], [image_id])
        results.append(metric.compute())
    assert results[0]["AP"] == results[1]["AP"] > 0


def detections(boxes_xyxy, scores, labels):
    from dino_lightning import Detections

    return Detections(
        boxes_xyxy=torch.from_numpy(boxes_xyxy).float(), scores=scores, labels=torch.from_numpy(labels).long()
    )


# --- buckets of like shape ---


@settings(max_examples=80, deadline=None)
@given(
    ratios=st.lists(st.floats(0.2, 5), min_size=1, max_size=120),
    processes=st.integers(1, 4),
    size=st.integers(1, 5),
    epoch=st.integers(0, 3),
    skip=st.integers(0, 10),
)
def test_buckets_hold_every_image_in_as_many_batches_for_each_process(ratios, processes, size, epoch, skip):
    parts = []
    for rank in range(processes):
        sampler = TrainSampler(
            range(len(ratios)), processes=processes, rank=rank, seed=1, batch_size=size, aspect_ratios=ratios
        )
        sampler.set_epoch(epoch)
        whole = list(sampler)
        sampler.skip = skip
        assert list(sampler) == whole[skip:]
        parts.append(whole)
    assert len({len(part) for part in parts}) == 1
    assert {index for part in parts for index, _, _ in part} == set(range(len(ratios)))
    for part in parts:
        for start in range(0, len(part), size):
            assert len({landscape for *_, landscape in part[start : start + size]}) == 1
    # the batches of the same step agree in orientation, so that no process waits for a larger one
    assert len({tuple(landscape for *_, landscape in part) for part in parts}) == 1


def test_buckets_bring_like_shapes_together_in_another_order_each_epoch():
    ratios = [1.0, 1.5, 2.0, 3.0] * 50
    orders = []
    for epoch in (0, 1):
        sampler = TrainSampler(range(200), seed=1, batch_size=4, aspect_ratios=ratios)
        sampler.set_epoch(epoch)
        orders.append([index for index, *_ in sampler])
        batches = torch.tensor([ratios[index] for index in orders[-1]]).reshape(-1, 4)
        assert (batches.max(1).values == batches.min(1).values).float().mean() > 0.8
        means = batches.mean(1)
        assert not torch.equal(means, means.sort().values)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("augmentation", ["plans", "flips", "none"])
def test_buckets_pad_less(root, tmp_path, augmentation):
    shares = []
    for buckets in (False, True):
        torch.manual_seed(0)
        data = data_module(
            root, num_workers=0, aspect_buckets=buckets, augmentation=augmentation, image_size=60, max_size=200
        )
        padded = real = 0
        for _ in range(6):
            for batch in data.train_dataloader():
                padded += batch.images[:, 0].numel()
                real += sum(height * width for height, width in batch.image_sizes)
        shares.append(real / padded)
    assert shares[1] > shares[0]
