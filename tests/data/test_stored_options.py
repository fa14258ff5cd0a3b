"""A data module is made again from its checkpoint, as far as plain values go."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dino_lightning import CocoDataModule
from dino_lightning.errors import DataError
from tests.data.small_coco import write_split


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_split(root / "train.json", root / "images", count=4)
    write_split(root / "val.json", root / "images", count=2, first_id=101)
    return root


def saved(data, path):
    """What Lightning writes of a data module into its checkpoint."""
    stored = {"datamodule_hyper_parameters": dict(data.hparams), "pytorch-lightning_version": "2.5.0"}
    torch.save({**stored, "epoch": 0, "global_step": 1, "state_dict": {}}, path)
    torch.load(path, weights_only=True)
    return path


def test_options_come_back_as_plain_values_and_new_ones_win(root, tmp_path):
    given = {"image_size": np.int64(32), "max_size": 64, "num_workers": 0, "augmentation": "plans"}
    data = CocoDataModule(root=root, augmentation_options={"rotation": np.float64(0.5)}, **given)
    path = saved(data, tmp_path / "a.ckpt")
    again = CocoDataModule.load_from_checkpoint(path)
    assert again.hparams == data.hparams and again.hparams["augmentation_options"] == {"rotation": 0.5}
    assert again.image_size == 32 and len(again.train_set) == 4
    assert CocoDataModule.load_from_checkpoint(path, batch_size=7).batch_size == 7


def test_transforms_in_python_have_to_be_given_again(root, tmp_path):
    transforms = [v2.RandomHorizontalFlip(), v2.RandomGrayscale()]
    path = saved(CocoDataModule(root=str(root), transforms=transforms), tmp_path / "a.ckpt")
    with pytest.raises(DataError, match=r"\(RandomHorizontalFlip, RandomGrayscale\) were objects.*give them again"):
        CocoDataModule.load_from_checkpoint(path)
    assert CocoDataModule.load_from_checkpoint(path, transforms=transforms).hparams["transforms"]
    assert CocoDataModule.load_from_checkpoint(path, transforms=None).hparams["transforms"] is None
    named = [{"class_path": "torchvision.transforms.v2.RandomGrayscale", "init_args": {"p": 0.5}}]
    path = saved(CocoDataModule(root=str(root), transforms=named), tmp_path / "b.ckpt")
    assert CocoDataModule.load_from_checkpoint(path).hparams["transforms"] == named


def test_datasets_in_python_have_to_be_given_again(tmp_path):
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    entry = (image, {"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([1])})
    path = saved(CocoDataModule.from_datasets([entry], [entry], num_workers=0), tmp_path / "a.ckpt")
    with pytest.raises(DataError, match=r"make it again: CocoDataModule\.from_datasets\(train, val\)"):
        CocoDataModule.load_from_checkpoint(path)
