"""The arrays of a large annotation file, kept on disk for the other processes of the machine."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from dino_lightning.data import annotation_file
from dino_lightning.data.annotation_file import load_coco, read_coco
from dino_lightning.data.coco import ROW_ARRAYS
from dino_lightning.data.reading import annotation_cache
from tests.data.small_coco import document, write_images, write_json


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "SMALLEST", 0)
    write_images(tmp_path / "images", document(count=5))
    write_json(tmp_path / "a.json", document(count=5))
    return tmp_path


def count_parses(monkeypatch, log: Path) -> None:
    read_tables = annotation_file.read_tables

    def counted(path):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return read_tables(path)

    monkeypatch.setattr(annotation_file, "read_tables", counted)


def parses(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def same(one, other) -> bool:
    arrays = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("offsets", *ROW_ARRAYS))
    return arrays and one.images == other.images and one.categories == other.categories


def test_a_file_is_parsed_once_and_read_alike(folder, monkeypatch):
    count_parses(monkeypatch, folder / "log")
    first = load_coco(folder / "a.json", folder / "images")
    second = load_coco(folder / "a.json", folder / "images")
    assert parses(folder / "log") == 1
    assert same(first, second) and isinstance(second.boxes_xyxy, np.memmap)
    assert second.summary == first.summary and same(first.subset([3, 1]), second.subset([3, 1]))


def test_another_content_time_folder_or_option_is_another_entry(folder, monkeypatch):
    count_parses(monkeypatch, folder / "log")
    path = folder / "a.json"
    load_coco(path, folder / "images")
    stamp = path.stat().st_mtime_ns
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][0] += 1  # as many bytes as before
    write_json(path, content)
    os.utime(path, ns=(stamp, stamp))
    assert load_coco(path, folder / "images").boxes_xyxy[0, 0] == 5
    os.utime(path, ns=(stamp + 1, stamp + 1))
    load_coco(path, folder / "images")
    load_coco(path, folder / "elsewhere")
    load_coco(path, folder / "images", annotation_file.ReadOptions(crowd="objects"))
    assert parses(folder / "log") == 5


def test_an_entry_holds_no_faults_and_no_renamed_files(folder, monkeypatch):
    count_parses(monkeypatch, folder / "log")
    load_coco(folder / "a.json", folder / "images")
    (folder / "images/1.png").rename(folder / "images/1.PNG")
    found, problems = read_coco(folder / "a.json", folder / "images")
    assert found.images[0].file_name == "1.PNG"
    assert [problem.kind for problem in problems] == ["file-name-matched"]
    assert read_coco(folder / "a.json", folder / "images")[1] == problems  # told every time
    assert parses(folder / "log") == 3


@pytest.mark.parametrize("damage", ["about.json", "boxes_xyxy.npy", "ids.npy"])
def test_a_damaged_entry_is_made_again(folder, monkeypatch, damage):
    count_parses(monkeypatch, folder / "log")
    first = load_coco(folder / "a.json", folder / "images")
    (entry,) = [path for path in annotation_cache.cache_folder().iterdir() if path.is_dir()]
    (entry / damage).write_bytes(b"{")
    assert same(first, load_coco(folder / "a.json", folder / "images"))
    assert same(first, load_coco(folder / "a.json", folder / "images"))
    assert parses(folder / "log") == 2


def test_without_a_folder_for_the_cache_the_file_is_parsed(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    assert len(load_coco(folder / "a.json", folder / "images").images) == 5


def test_the_oldest_entries_are_removed(folder, monkeypatch):
    monkeypatch.setattr(annotation_cache, "ENTRIES", 2)
    for number in range(4):
        load_coco(folder / "a.json", folder / f"images{number}")
    names = {path.name for path in annotation_cache.cache_folder().iterdir()}
    assert len([name for name in names if not name.endswith(".lock")]) == 2


def read_in_a_process(path: Path, results) -> None:
    found = load_coco(path, path.parent / "images")
    results.put((found.boxes_xyxy.sum(), [image.file_name for image in found.images]))


def test_processes_that_start_together_parse_once(folder, monkeypatch):
    count_parses(monkeypatch, folder / "log")
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    processes = [fork.Process(target=read_in_a_process, args=(folder / "a.json", results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(one == found[0] for one in found)
    assert parses(folder / "log") == 1
