"""Steps that are not finite are left out, named and kept; too many in a row stop the run; weights are never spoilt."""

import itertools
import warnings

import lightning
import pytest
import torch

from dino_lightning import CocoDataModule, DINOModule
from dino_lightning.errors import NonFiniteError
from tests.conftest import TINY_SIZES

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}


class Poisoned(DINOModule):
    """Predictions or gradients turn to NaN at given steps, or infinite."""

    at, what = (), "predictions"

    def training_step(self, batch, batch_idx):
        if self.global_step in self.at and self.what == "predictions":
            head = self.model.decoder.class_head
            handle = head.register_forward_hook(lambda module, args, output: output * float("nan"))
            try:
                return super().training_step(batch, batch_idx)
            finally:
                handle.remove()
        return super().training_step(batch, batch_idx)

    def on_after_backward(self):
        if self.global_step in self.at and self.what == "gradients":
            self.model.level_embedding.grad[0, 0] = float("inf")


class States(lightning.Callback):
    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def train(rooms, tmp_path, at, what="predictions", steps=8, **options):
    lightning.seed_everything(3, verbose=False)
    data = CocoDataModule(root=str(rooms), image_size=64, max_size=96, num_workers=0, batch_size=2)
    module = Poisoned(num_classes=data.num_classes, backbone_weights=None, **{**TINY_SIZES, **options})
    module.at, module.what = at, what
    states = States()
    trainer = lightning.Trainer(max_steps=steps, callbacks=[states], default_root_dir=tmp_path, **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data)
            error = None
        except NonFiniteError as raised:
            error = raised
    said = [str(warning.message) for warning in caught if "is left out" in str(warning.message)]
    return module, states.after, said, error


@pytest.mark.parametrize("what", ["predictions", "gradients"])
@pytest.mark.parametrize("clip", [0.1, 0.0])
def test_a_step_is_left_out_and_named(rooms, tmp_path, what, clip):
    _, after, said, error = train(rooms, tmp_path, at=(2, 3), what=what, clip_grad_norm=clip)
    assert error is None and len(after) == 8
    for step, (one, two) in enumerate(itertools.pairwise(after), start=1):
        same = all(torch.equal(one[name], two[name]) for name in one)
        assert same == (step in (2, 3)), step
    assert all(torch.isfinite(value).all() for value in after[-1].values())
    assert len(said) == 2 and "Step 3 is left out" in said[0] and "image ids [" in said[0]


def test_the_batch_is_kept(rooms, tmp_path):
    _, _, said, _ = train(rooms, tmp_path, at=(2,))
    (path,) = (tmp_path / "non_finite").iterdir()
    assert str(path) in said[0]
    content = torch.load(path, weights_only=True)
    assert content["step"] == 3 and f"{content['image_ids']}" in said[0]
    assert content["images"].dtype == torch.uint8 and len(content["images"]) == 2
    assert content["boxes_cxcywh"].shape[:2] == content["labels"].shape


@pytest.mark.parametrize("what", ["predictions", "gradients"])
def test_too_many_in_a_row_stop(rooms, tmp_path, what):
    _, after, said, error = train(rooms, tmp_path, at=range(3, 20), what=what, max_non_finite_steps=2)
    assert "3 steps in a row" in str(error) and "the last checkpoint is good" in str(error)
    assert len(error.image_ids) == 2 and "\n" not in str(error)
    assert all(torch.equal(value, after[2][name]) for name, value in after[-1].items())
    assert len(said) == 3


def test_it_counts_only_those_in_a_row(rooms, tmp_path):
    _, _, said, error = train(rooms, tmp_path, at=(1, 2, 4, 5, 6 + 1), max_non_finite_steps=2, steps=10)
    assert error is None and len(said) == 5


def test_without_leave_it_stops_at_once(rooms, tmp_path):
    *_, error = train(rooms, tmp_path, at=(2,), max_non_finite_steps=0)
    assert "are not finite" in str(error)
