"""`preview` through the command line: what the model sees, on a sheet."""

import numpy as np
import pytest
from PIL import Image

from dino_lightning.__main__ import run
from tests.data.small_coco import document, write_images, write_json


def sheet(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(
    "options",
    [
        ["--data.augmentation", "plans"],
        ["--data.augmentation=coco", "--split", "val"],
        ["--data.augmentation", "plans", "--data.augmentation_options", "{rotation: 0, crop: 0}"],
        ["--data.fixed_size=64", "--data.fixed_size_mode=stretch"],
        ["--config", "configs/rooms_demo.yaml", "--data.aspect_buckets", "true"],
    ],
    ids=" ".join,
)
def test_a_sheet_is_drawn_with_any_option_of_fit(rooms, tmp_path, capsys, options):
    path = tmp_path / "sheets" / "a.png"
    common = ["--data.root", str(rooms), "--data.image_size=64", "--data.max_size=96", "--output", str(path)]
    assert run(["preview", *common, *options, "--num_images", "4"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    colours = sheet(path).reshape(-1, 3)
    assert len(colours) > 500 * 500
    assert (np.abs(colours.astype(int) - [0xD1, 0x49, 0x5B]).max(1) < 12).any()  # the boxes' colour


def test_the_sheet_follows_from_the_seed(rooms, tmp_path):
    common = ["preview", "--data.root", str(rooms), "--data.image_size=64", "--data.max_size=96", "--num_images=3"]
    pictures = []
    for number, seed in enumerate((1, 1, 2)):
        path = tmp_path / f"{number}.png"
        assert run([*common, "--data.augmentation=plans", f"--seed_everything={seed}", "--output", str(path)]) == 0
        pictures.append(sheet(path))
    assert np.array_equal(pictures[0], pictures[1])
    assert pictures[0].shape != pictures[2].shape or not np.array_equal(pictures[0], pictures[2])


def test_few_images_are_drawn_several_times(tmp_path, capsys):
    content = document(2)
    write_json(tmp_path / "train.json", content)
    write_images(tmp_path / "images", content)
    write_json(tmp_path / "val.json", content)
    output = ["--output", str(tmp_path / "a.png"), "--data.image_size=32", "--num_images=5"]
    assert run(["preview", "--data.root", str(tmp_path), *output]) == 0
    assert "There are 2 images; each is drawn several times" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--data.root", "nowhere"], 1, "nowhere: the dataset folder does not exist"),
        (["--data.rooot", "x"], 2, "There is no option --data.rooot"),
        (["--num_images", "0"], 2, "--num_images is 0; it must be at least 1"),
        (["--data.augmentation_options", "{flipp: 1}"], 1, "no augmentation option flipp; those of coco are flip"),
        (["--data.fixed_size_mode", "stretch"], 1, "fixed_size_mode=stretch needs a fixed_size"),
    ],
)
def test_bad_input_is_one_sentence(rooms, tmp_path, capsys, options, code, sentence):
    arguments = ["preview", "--data.root", str(rooms), "--output", str(tmp_path / "a.png"), *options]
    assert run(arguments) == code
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err
    assert not (tmp_path / "a.png").exists()
