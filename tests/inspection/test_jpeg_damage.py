"""Damage inside JPEG files is found where pixels differ, and nowhere else."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.io import encode_jpeg

from dino_lightning.inspection.jpeg_damage import jpeg_damage

WAYS = [
    {},
    {"quality": 20},
    {"quality": 100},
    {"quality": 95, "subsampling": 0},
    {"optimize": True},
    {"progressive": True},
    {"restart_marker_blocks": 4},
    {"exif": b"Exif\0\0" + bytes(3000), "icc_profile": bytes(3000), "comment": bytes(2000)},
]


def drawing() -> Image.Image:
    """A plan on white paper, much of it empty."""
    image = Image.new("RGB", (640, 480), "white")
    canvas = ImageDraw.Draw(image)
    for k in range(9):
        canvas.rectangle((20 + 66 * k, 40, 80 + 66 * k, 300 + 10 * k), outline="black", width=3)
        canvas.text((30 + 66 * k, 60), f"room {k}", fill="black")
    return image


def photograph() -> Image.Image:
    """Waves with some noise."""
    yy, xx = np.mgrid[:480, :640]
    waves = np.stack([127 + 90 * np.sin(xx / 40 + k) * np.cos(yy / (25 + 9 * k)) for k in range(3)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return Image.fromarray((waves + noise).clip(0, 255).astype(np.uint8))


IMAGES = {"drawing": drawing(), "photograph": photograph(), "white": Image.new("RGB", (640, 480), "white")}


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def differ(one: bytes, other: bytes) -> bool:
    return not np.array_equal(np.asarray(Image.open(io.BytesIO(one))), np.asarray(Image.open(io.BytesIO(other))))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", IMAGES)
def test_sound_files_are_sound(name, mode):
    for options in WAYS:
        content = saved(IMAGES[name].convert(mode), **options)
        for variant in (content, content + bytes(500), content + b"appended" * 9, content + content):
            assert jpeg_damage(variant) == "", options


@pytest.mark.parametrize("quality", [10, 75, 100])
def test_files_of_torchvision_are_sound(quality):
    pixels = torch.from_numpy(np.array(IMAGES["photograph"])).permute(2, 0, 1)
    assert jpeg_damage(encode_jpeg(pixels, quality).numpy().tobytes()) == ""


@pytest.mark.parametrize("options", WAYS[:-1], ids=str)
@pytest.mark.parametrize("name", ["drawing", "photograph"])
@pytest.mark.parametrize("place", [0.2, 0.4, 0.6, 0.8, 0.95])
def test_zeros_in_the_middle_are_found(name, options, place):
    content = saved(IMAGES[name], **options)
    start = content.index(b"\xff\xda") + 20
    position = start + int(place * (len(content) - start))
    count = min(512, (len(content) - position) // 2)
    broken = content[:position] + bytes(count) + content[position + count :]
    assert differ(content, broken)
    if (name, options, place) != ("drawing", {"progressive": True}, 0.8):  # zeros would mean "nothing more" there
        assert jpeg_damage(broken)


def test_the_decoder_is_quoted():
    content = saved(IMAGES["photograph"])
    half = len(content) // 2
    assert jpeg_damage(content[:half]) == "Premature end of JPEG file"
    assert jpeg_damage(content[:half] + bytes(300) + content[half + 300 :]).startswith("Corrupt JPEG data: ")


def test_zeros_of_the_right_length_are_found_by_what_they_would_mean():
    # blocks of zero bits may be as long as real ones, so that libjpeg counts the right number of them
    content = saved(IMAGES["photograph"], quality=85)
    found = []
    for position in range(len(content) // 3, len(content) // 3 + 3000, 100):
        found.append(jpeg_damage(content[:position] + bytes(64) + content[position + 64 :]))
    assert all(found)
    assert any("zero bytes in place of pixels at byte" in text for text in found)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\x10", b"\xff\xd8\xff\xda\0\0", b"\xff\xd8\xff" * 50, b"PNG"]
)
def test_what_is_no_jpeg_file_is_left_to_the_decoders(content):
    assert isinstance(jpeg_damage(content), str)


def test_any_bytes_end_in_a_text():
    random, content = np.random.default_rng(1), saved(IMAGES["drawing"])
    for _ in range(150):
        broken = bytearray(content)
        for position in random.integers(2, len(content), 4).tolist():
            broken[position] = int(random.integers(256))
        assert isinstance(jpeg_damage(bytes(broken[: int(random.integers(2, len(content)))])), str)
