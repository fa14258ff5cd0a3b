"""Scaled-down images on disk: the same pixels, whatever happens to the folder."""

import errno
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning import CocoDataModule
from dino_lightning.data import cache as cache_file
from dino_lightning.data.cache import ImageCache
from dino_lightning.errors import DataError
from tests.data.small_coco import document, write_json


def big_images(root, count=6, size=(400, 300)):
    """A dataset of large smooth images (so that training's sizes are far below theirs)."""
    content = document(count)
    for entry in content["images"]:
        entry["width"], entry["height"] = size
        noise = np.random.default_rng(entry["id"]).integers(0, 256, (6, 8, 3)).astype(np.uint8)
        path = root / "images" / entry["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    write_json(root / "train.json", content)
    return root


@pytest.fixture
def root(tmp_path):
    return big_images(tmp_path / "data")


def data_module(root, cache_dir=None, **more):
    options = {"image_size": 60, "max_size": 100, "num_workers": 0, "augmentation": "none", **more}
    return CocoDataModule(root=str(root), cache_dir=None if cache_dir is None else str(cache_dir), **options)


def image_cache(folder, max_bytes=10**9):
    return ImageCache(folder, image_size=60, max_size=100, max_bytes=max_bytes)


def entries(folder):
    return sorted(folder.rglob("*.rgb"))


def same(one, other):
    return all(
        torch.equal(one[i].image, other[i].image)
        and torch.allclose(one[i].boxes_cxcywh, other[i].boxes_cxcywh, atol=1e-6)
        and torch.equal(one[i].labels, other[i].labels)
        and one[i].original_size == other[i].original_size
        for i in range(len(one))
    )


def test_the_cache_changes_no_pixel_no_box_and_no_size(root, tmp_path):
    plain, cached = data_module(root).train_set, data_module(root, tmp_path / "cache").train_set
    assert same(plain, cached)
    assert len(entries(tmp_path / "cache")) == len(cached)
    assert same(plain, cached)
    assert same(plain, data_module(root, tmp_path / "cache").train_set)


def test_a_second_reading_decodes_nothing(root, tmp_path, monkeypatch):
    cached = data_module(root, tmp_path / "cache").train_set
    first = [cached[i].image for i in range(len(cached))]

    def fail(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache_file, "decode_bytes", fail)
    monkeypatch.setattr(cache_file, "read_bytes", fail)
    assert all(torch.equal(cached[i].image, image) for i, image in enumerate(first))


def test_images_that_are_hardly_larger_are_not_stored(tmp_path):
    root = big_images(tmp_path / "data", size=(96, 72))
    cached = data_module(root, tmp_path / "cache").train_set
    assert same(data_module(root).train_set, cached)
    assert entries(tmp_path / "cache") == []


def test_a_changed_file_is_read_again(root, tmp_path):
    cache = image_cache(tmp_path / "cache")
    path = root / "images/1.png"
    before, _ = cache.read(path)
    Image.new("RGB", (200, 300), "red").save(path)
    after, size = cache.read(path)
    assert size == (300, 200) and after[:, 0, 0].tolist() == [255, 0, 0]
    assert not torch.equal(before[:, :60, :60], after[:, :60, :60])


def test_other_sizes_have_entries_of_their_own(root, tmp_path):
    data_module(root, tmp_path / "cache", image_size=30).train_set[0]
    assert same(data_module(root).train_set, data_module(root, tmp_path / "cache").train_set)


def test_a_removed_file_is_missed_though_its_pixels_are_stored(root, tmp_path):
    cache = image_cache(tmp_path / "cache")
    cache.read(root / "images/1.png")
    (root / "images/1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png does not exist"):
        cache.read(root / "images/1.png")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "longer", "folder"])
def test_a_damaged_entry_is_never_believed(root, tmp_path, damage):
    plain, cached = data_module(root).train_set, data_module(root, tmp_path / "cache").train_set
    assert same(plain, cached)
    for entry in entries(tmp_path / "cache"):
        whole = entry.read_bytes()
        if damage == "folder":
            entry.unlink()
            entry.mkdir()
        else:
            damaged = {"cut": whole[:-5], "empty": b"", "text": b"x" * len(whole), "longer": whole + b"x"}[damage]
            entry.write_bytes(damaged)
    assert same(plain, cached)
    if damage != "folder":
        assert all(entry.stat().st_size == len(whole) for entry in entries(tmp_path / "cache"))


def test_the_folder_stays_within_its_limit_and_keeps_what_this_run_uses(root, tmp_path):
    folder = tmp_path / "cache"
    cache = image_cache(folder)
    cache.read(root / "images/1.png")
    one = entries(folder)[0].stat().st_size
    cache = image_cache(folder, max_bytes=3 * one + 100)
    for number in range(1, 7):
        cache.read(root / f"images/{number}.png")
    kept = entries(folder)
    assert len(kept) == 3
    assert "its limit" in cache.problem and "cache_gigabytes" in cache.problem
    cache.read(root / "images/6.png")
    assert entries(folder) == kept


def test_what_earlier_runs_left_makes_room_the_longest_unused_first(root, tmp_path):
    folder = tmp_path / "cache"
    earlier = image_cache(folder)
    for number in (1, 2, 3):
        earlier.read(root / f"images/{number}.png")
    ages = {entry: age for age, entry in enumerate(entries(folder), 2)}
    for entry, age in ages.items():
        os.utime(entry, (time.time() - 3600 * age,) * 2)
    one = entries(folder)[0].stat().st_size
    cache = image_cache(folder, max_bytes=3 * one + 100)
    cache.read(root / "images/4.png")
    assert max(ages, key=ages.get) not in entries(folder) and len(entries(folder)) == 3
    for number in (5, 6):
        cache.read(root / f"images/{number}.png")
    assert not set(ages) & set(entries(folder)) and cache.problem is None


def test_an_entry_in_use_is_not_thrown_out(root, tmp_path):
    folder = tmp_path / "cache"
    image_cache(folder).read(root / "images/1.png")
    os.utime(entries(folder)[0], (time.time() - 9999,) * 2)
    one = entries(folder)[0].stat().st_size
    cache = image_cache(folder, max_bytes=one + 100)
    cache.read(root / "images/1.png")
    cache.read(root / "images/2.png")
    assert len(entries(folder)) == 1 and cache.problem is not None


def test_forgotten_temporary_files_are_removed_and_nothing_else(root, tmp_path):
    folder = tmp_path / "cache"
    cache = image_cache(folder)
    forgotten, fresh, foreign = (folder / "ab" / name for name in ("old.tmp", "new.tmp", "notes.txt"))
    for path in (forgotten, fresh, foreign):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    for path in (forgotten, foreign):
        os.utime(path, (time.time() - 9999,) * 2)
    cache.read(root / "images/1.png")
    assert not forgotten.exists() and fresh.exists() and foreign.exists()


def read_all(root: Path, folder: Path) -> int:
    cache = image_cache(folder)
    return int(sum(cache.read(root / f"images/{number}.png")[0].sum() for _ in range(3) for number in range(1, 7)))


def test_processes_share_a_folder(root, tmp_path):
    alone = read_all(root, tmp_path / "alone")
    with ProcessPoolExecutor(3) as pool:
        sums = list(pool.map(read_all, [root] * 6, [tmp_path / "shared"] * 6))
    assert sums == [alone] * 6
    assert len(entries(tmp_path / "shared")) == 6
    assert list((tmp_path / "shared").rglob("*.tmp")) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_under_the_cache_is_said_once_and_training_goes_on(root, tmp_path, monkeypatch, workers):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_file.os, "fsync", full)
    data = data_module(root, tmp_path / "cache", num_workers=workers, batch_size=1)
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            seen = [data.on_before_batch_transfer(batch, 0) for batch in data.train_dataloader()]
    assert sum(len(batch) for batch in seen) == len(data.train_set)
    said = [str(warning.message) for warning in caught if "cannot be written" in str(warning.message)]
    assert len(said) == 1 and "the disk is full" in said[0]
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_a_folder_that_cannot_be_made_is_refused_before_training(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cache_dir: .*file/cache cannot be written"):
        data_module(root, tmp_path / "file" / "cache")


@pytest.mark.parametrize(
    "sizes", [{"image_size": 60, "max_size": 100}, {"fixed_size": 60, "fixed_size_mode": "stretch"}]
)
def test_images_to_evaluate_are_resized_once(tmp_path, sizes):
    """A copy resized by the rule may have another size by the rule: 400 x 138 becomes 98 x 34, and that 100 x 35."""
    root = big_images(tmp_path / "data", count=10, size=(400, 138))
    plain, cached = (data_module(root, folder, **sizes).val_set for folder in (None, tmp_path / "cache"))
    assert same(plain, cached) and same(plain, cached)
    assert len(entries(tmp_path / "cache")) == len(cached) == 1
