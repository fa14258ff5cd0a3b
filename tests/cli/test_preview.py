"""`preview` through the command line: what the model sees, on a sheet."""

import numpy as np
import pytest
from PIL import Image

from dino_lightning.__main__ import run
from tests.data.small_coco import annotation, document, write_images, write_json

RED = (0xD1, 0x49, 0x5B)  # of the first class


def near(pixels, colour):
    return np.abs(pixels.astype(int) - colour).max(-1) < 12


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
        ["--data.drawn_plans=8", "--data.mosaic=1"],
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
    assert near(colours, RED).any()


def test_the_sheet_follows_from_the_seed(rooms, tmp_path):
    common = ["preview", "--data.root", str(rooms), "--data.image_size=64", "--data.max_size=96", "--num_images=3"]
    pictures = []
    for number, seed in enumerate(("--seed=1", "--seed_everything=1", "--seed=2")):
        path = tmp_path / f"{number}.png"
        assert run([*common, "--data.augmentation=plans", seed, "--output", str(path)]) == 0
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
        (["--num_images", "0"], 2, "error: --num_images is 0; it must be at least 1 and at most 200."),
        (["--num_images", "201"], 2, "error: --num_images is 201; it must be at least 1"),
        (["--num_images", "many"], 2, "error: argument --num_images: invalid int value: 'many'"),
        (["--split", "test"], 2, "error: argument --split: invalid choice: 'test'"),
        (["--seed"], 2, "error: argument --seed: expected one argument"),
        (["--data.augmentation", "strong"], 2, "strong"),
        (["--data.augmentation_options", "[1]"], 2, "augmentation_options"),
        (["--data.augmentation=plans", "--data.augmentation_options.blur=2"], 1, "blur is 2; it must lie between 0"),
        (["--config", "none.yaml"], 2, "none.yaml"),
        (["--data.augmentation_options", "{flipp: 1}"], 1, "no augmentation option flipp; those of coco are flip"),
        (["--data.fixed_size_mode", "stretch"], 1, "fixed_size_mode=stretch needs a fixed_size"),
    ],
)
def test_bad_input_is_one_sentence(rooms, tmp_path, capsys, options, code, sentence):
    arguments = ["preview", "--data.root", str(rooms), "--output", str(tmp_path / "a.png"), *options]
    assert run(arguments) == code
    err = capsys.readouterr().err
    assert sentence in err and "Traceback" not in err and err.count("error:") == 1
    assert not (tmp_path / "a.png").exists()


def one_dark_rectangle(root, file_name="a.png", name="room"):
    """A white page of 200 x 100 pixels with one dark rectangle, which is a box."""
    page = np.full((100, 200, 3), 255, dtype=np.uint8)
    page[30:90, 40:160] = 0
    (root / "images").mkdir()
    Image.fromarray(page).save(root / "images" / file_name)
    content = {
        "images": [{"id": 1, "file_name": file_name, "width": 200, "height": 100}],
        "annotations": [annotation(1, 1, 3, [40, 30, 120, 60])],
        "categories": [{"id": 3, "name": name}],
    }
    for split in ("train", "val"):
        write_json(root / f"{split}.json", content)
    return ["preview", "--data.root", str(root), "--output", str(root / "a.png")]


def extent(mask):
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()])


@pytest.mark.parametrize(
    "options",
    [
        ["--split", "val"],
        ["--data.augmentation", "flips", "--seed", "3"],
        ["--data.augmentation", "coco", "--data.augmentation_options", "{crop: 0}"],
        ["--data.fixed_size", "300", "--data.fixed_size_mode", "letterbox", "--split", "val"],
        ["--data.fixed_size", "300", "--data.fixed_size_mode", "stretch"],
    ],
    ids=" ".join,
)
def test_the_outline_on_the_sheet_lies_round_the_thing(tmp_path, options):
    assert run([*one_dark_rectangle(tmp_path), "--num_images=1", *options]) == 0
    picture = sheet(tmp_path / "a.png")
    picture = picture[140:]  # below heading and title
    outline = extent(near(picture, RED))
    thing = extent(near(picture, (0, 0, 0)))
    assert (thing[2:] - thing[:2] > 40).all()
    np.testing.assert_allclose(outline, thing, atol=5)


def test_padding_is_striped(tmp_path):
    common = one_dark_rectangle(tmp_path)
    for options, striped in ((["--data.fixed_size=256"], True), ([], False)):
        assert run([*common, "--num_images=1", "--data.augmentation=none", *options]) == 0
        colours = sheet(tmp_path / "a.png").reshape(-1, 3)
        assert (near(colours, (215, 215, 215)).sum() > 10_000) == striped
        assert (near(colours, (240, 240, 240)).sum() > 10_000) == striped


def test_odd_names_are_drawn_as_they_are(tmp_path):
    """Dollar signs would start a formula."""
    common = one_dark_rectangle(tmp_path, "$x_" + 60 * "long" + "$^.png", "kitchen $_{^ 5")
    assert run([*common, "--num_images=1"]) == 0


def test_configurations_of_the_package_are_found_from_anywhere(rooms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--config", "configs/rooms_demo.yaml", "--num_images", "1", "--split", "val"]
    assert run(["preview", "--data.root", str(rooms), *options]) == 0
    assert sheet(tmp_path / "preview.png").size


def test_a_split_with_few_images_is_drawn_once(rooms, tmp_path, capsys):
    options = ["--split", "val", "--data.image_size=64", "--output", str(tmp_path / "a.png")]
    assert run(["preview", "--data.root", str(rooms), *options]) == 0
    assert "There are only 4 images." in capsys.readouterr().out


def test_an_output_that_cannot_be_written_is_named(rooms, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    options = ["--num_images=1", "--data.image_size=64", "--output", str(tmp_path / "file" / "a.png")]
    assert run(["preview", "--data.root", str(rooms), *options]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as ended:
        run(["preview", "--help"])
    assert ended.value.code == 0
    assert "--num_images" in capsys.readouterr().out
