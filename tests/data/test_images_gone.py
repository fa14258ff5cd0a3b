"""Images that are gone: no other split's take their place, and nothing is learnt from empty pages alone."""

import shutil
import warnings

import pytest

from dino_lightning.__main__ import run
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import DataError
from tests.conftest import TINY_ARGS


@pytest.fixture
def plans(rooms, tmp_path):
    return shutil.copytree(rooms, tmp_path / "plans")


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_folder_that_is_gone_is_an_error(plans, split, on_bad_image, capsys):
    """Both splits have a 000001.png."""
    shutil.rmtree(plans / split / "images")
    args = ["fit", "--data.root", str(plans), *TINY_ARGS, "--run_dir", str(plans / "run")]
    assert run([*args, f"--data.on_bad_image={on_bad_image}"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {plans / split / 'annotations.json'}: ") and "000001.png does not exist" in error
    assert not (plans / "run" / "metrics.csv").exists()


def test_a_folder_that_goes_during_training_stops_it(plans):
    data = CocoDataModule(root=str(plans), on_bad_image="skip", batch_size=2, num_workers=0, image_size=64, max_size=96)
    shutil.rmtree(plans / "val" / "images")
    with pytest.raises(DataError, match="not one of its 4 images can be read"):
        data.val_dataloader()
    loader = data.train_dataloader()
    files = sorted((plans / "train" / "images").iterdir())
    for file in files[:-1]:
        file.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each kind of trouble is told once, as tests of the loader check
        for _ in range(2):
            for batch in loader:
                data.on_before_batch_transfer(batch, 0)  # one of eight is there
        files[-1].unlink()
        with pytest.raises(DataError, match=r"None of the last \d+ images of .*/train/annotations.json could be read"):
            for _ in range(3):
                for batch in loader:
                    data.on_before_batch_transfer(batch, 0)
