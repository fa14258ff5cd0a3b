"""Two processes on the CPU (gloo): the same training as one, whatever each of them gets."""

import csv
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from dino_lightning.cli.run_options import ddp_strategy
from dino_lightning.model import DINO
from tests.conftest import TINY_ARGS, TINY_SIZES

# Trains three steps without shuffling on eight images of one size and writes what came out.
SCRIPT = textwrap.dedent(
    """
    import json, os, sys
    import lightning, torch
    from torch.utils.data import DataLoader
    from dino_lightning import Batch, DINOModule

    options = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    lightning.seed_everything(3)
    generator = torch.Generator().manual_seed(0)

    def sample(index):
        count = 0 if options["empty"] == "all" or (options["empty"] == "odd" and index % 2) else index % 4 + 1
        centre = torch.rand(count, 2, generator=generator) * 0.5 + 0.25
        boxes = torch.cat((centre, torch.rand(count, 2, generator=generator) * 0.3 + 0.1), dim=1)
        image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        return image, (boxes, torch.randint(0, 3, (count,), generator=generator))

    def collate(samples):
        return Batch.from_images([image for image, _ in samples], targets=[target for _, target in samples])

    class Recorder(lightning.Callback):
        losses = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))

    samples = [sample(index) for index in range(12)]
    devices = options["devices"]
    # rank r sees every other image of each global batch; Lightning's own sampler would shuffle
    order = [i for i in range(12) if i % devices == int(os.environ.get("LOCAL_RANK", 0))]
    loader = DataLoader(samples, batch_size=4 // devices, sampler=order, collate_fn=collate)
    module = DINOModule(num_classes=3, backbone_weights=None, lr=1e-3, **options["model"])
    trainer = lightning.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto",
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )
    recorder = Recorder()
    trainer.callbacks.append(recorder)
    trainer.fit(module, train_dataloaders=loader)
    if trainer.is_global_zero:
        torch.save({"losses": recorder.losses, "state": module.state_dict()}, options["out"])
    """
)


def child_environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run_in(tmp_path, command):
    """Run a program that must succeed; gives what it printed."""
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def train(tmp_path, devices, *, denoising=0, empty="none"):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    out = tmp_path / f"{devices}.pt"
    options = {"devices": devices, "out": str(out), "empty": empty}
    options["model"] = {**TINY_SIZES, "num_denoising": denoising}
    command = [sys.executable, str(script), json.dumps(options)]
    run_in(tmp_path, command)
    return torch.load(out, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("empty", ["none", "odd"])
def test_two_processes_train_as_one(tmp_path, empty):
    """Same global batches, same losses, same weights; with "odd" the second process never sees a box."""
    one, two = train(tmp_path, 1, empty=empty), train(tmp_path, 2, empty=empty)
    assert len(one["losses"]) == 3
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, value in one["state"].items():
        torch.testing.assert_close(two["state"][name], value, atol=2e-4, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("empty", ["odd", "all"])
def test_a_process_without_boxes_neither_hangs_nor_crashes(tmp_path, empty):
    """With denoising queries on one process and none on the other, plain ddp still finds every parameter used."""
    losses = train(tmp_path, 2, denoising=50, empty=empty)["losses"]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize("compress", [False, True])
def test_the_command_line_under_ddp_writes_everything_once(rooms, tmp_path, compress):
    command = [sys.executable, "-m", "dino_lightning.fit", "--data.root", str(rooms), *TINY_ARGS]
    command += [
        "--trainer.max_epochs=2",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--data.batch_size=2",
        f"--compress_gradients={compress}",
    ]
    done = run_in(tmp_path, command)
    (run,) = (tmp_path / "runs").iterdir()
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["best.ckpt", "last.ckpt", "metrics.csv", "previous.ckpt"]
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    with (run / "metrics.csv").open() as file:
        evaluated = [row for row in csv.DictReader(file) if row["val/AP"]]
    assert len(evaluated) == 2
    assert done.stdout.count("best checkpoint") == 1
    assert "find_unused_parameters" not in done.stderr


@pytest.mark.slow
def test_each_process_predicts_its_share_of_the_images(rooms, tmp_path):
    (tmp_path / "share.py").write_text(
        textwrap.dedent(
            """
            import json, os, sys
            import lightning
            from dino_lightning import CocoDataModule, DINOModule

            data = CocoDataModule(root=sys.argv[1], image_size=64, max_size=96, num_workers=0)
            quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet)
            model = DINOModule(num_classes=data.num_classes, backbone_weights=None, **json.loads(sys.argv[2]))
            ids = [found.image_id for batch in trainer.predict(model, datamodule=data) for found in batch]
            with open(f"{trainer.global_rank}.json", "w") as file:
                json.dump(ids, file)
            """
        )
    )
    run_in(tmp_path, [sys.executable, "share.py", str(rooms), json.dumps(TINY_SIZES)])
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[1, 3], [2, 4]]


@pytest.mark.parametrize(("norm", "sent"), [("frozen", False), ("group", False), ("batch", True)])
def test_buffers_are_sent_where_they_change(norm, sent):
    model = DINO(num_classes=1, **TINY_SIZES | {"backbone_norm": norm})
    given = ddp_strategy(model, compress_gradients=False)._ddp_kwargs
    assert [value for name, value in given.items() if "buffers" in name] == [sent]
