from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_lightning.data import read_image
from dino_lightning.data.cache import ImageCache
from dino_lightning.data.image_files import read_bytes
from dino_lightning.data.images import to_pixels
from dino_lightning.errors import DataError

GRADIENT = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
COLOURS = np.random.default_rng(0).integers(0, 256, (24, 36, 3)).astype(np.uint8)
# Smooth, so that lossy formats keep it nearly as it is.
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:240:10, 20:200:5], 90), axis=-1).astype(np.uint8)


def pixels(path):
    image = read_image(path)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "gif"])
def test_lossless_formats_are_read_exactly(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    few_colours = COLOURS // 64 * 64
    Image.fromarray(few_colours).save(path)
    assert np.array_equal(pixels(path), few_colours)


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_jpeg_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / "a.jpg"
    Image.fromarray(SMOOTH).convert(mode).save(path, quality=98)
    assert np.abs(pixels(path) - SMOOTH).max() <= 12


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_becomes_three_equal_channels(tmp_path, mode):
    path = tmp_path / "a.png"
    grey = Image.fromarray(COLOURS).convert(mode)
    grey.save(path)
    assert np.array_equal(pixels(path), np.repeat(np.asarray(grey.convert("L"))[:, :, None], 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(GRADIENT).save(path)
    expected = np.rint(GRADIENT / 257)
    assert expected[0, 0] == 0 and expected[-1, -1] == 255
    assert np.array_equal(pixels(path), np.repeat(expected[:, :, None], 3, axis=2))


def test_palette_colours_are_looked_up(tmp_path):
    path = tmp_path / "a.png"
    palette = Image.fromarray(COLOURS).quantize(16)
    palette.save(path)
    assert np.array_equal(pixels(path), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(tmp_path, mode):
    path = tmp_path / "a.png"
    image = Image.fromarray(COLOURS).convert(mode)
    alpha = np.zeros((24, 36), np.uint8)
    alpha[:, 12:24] = 128
    alpha[:, 24:] = 255
    image.putalpha(Image.fromarray(alpha))
    image.save(path)
    found = pixels(path)
    opaque = np.asarray(image.convert("RGB")).astype(int)
    assert (found[:, :12] == 255).all()
    assert np.abs(found[:, 12:24] - (opaque[:, 12:24] + 255) / 2).max() <= 1.5
    assert np.array_equal(found[:, 24:], opaque[:, 24:])


def test_a_transparent_palette_entry_shows_white(tmp_path):
    path = tmp_path / "a.png"
    palette = Image.fromarray(COLOURS).quantize(8)
    palette.save(path, transparency=3)
    found, transparent = pixels(path), np.asarray(palette) == 3
    assert transparent.any() and (found[transparent] == 255).all()
    assert np.array_equal(found[~transparent], np.asarray(palette.convert("RGB"))[~transparent])


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (3, SMOOTH[::-1, ::-1]),
        (6, np.rot90(SMOOTH, -1)),
        (8, np.rot90(SMOOTH)),
        (5, SMOOTH.transpose(1, 0, 2)),
    ],
)
def test_exif_orientation_is_applied(tmp_path, suffix, orientation, upright):
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(SMOOTH)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=98)
    found = pixels(path)
    assert found.shape == upright.shape
    assert np.abs(found - upright).max() <= 16


def test_sixteen_bits_are_turned_upright_too(tmp_path):
    path = tmp_path / "a.png"
    image = Image.fromarray(GRADIENT)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert np.array_equal(pixels(path)[:, :, 1], np.rot90(np.rint(GRADIENT / 257), -1))


def test_damaged_exif_does_not_make_an_image_unreadable(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(SMOOTH).save(path, quality=98, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xffgarbage")
    assert np.abs(pixels(path) - SMOOTH).max() <= 12


def whole_jpeg(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "whole.jpg")
    return (tmp_path / "whole.jpg").read_bytes()


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "png_cut", "32 bits"])
def test_what_cannot_be_decoded_is_named(tmp_path, damage):
    path = tmp_path / "bad.tiff"
    if damage == "32 bits":
        Image.fromarray(COLOURS[:, :, 0].astype(np.float32)).save(path)
    elif damage == "png_cut":
        Image.fromarray(COLOURS).save(tmp_path / "whole.png")
        path.write_bytes((tmp_path / "whole.png").read_bytes()[:-400])
    else:
        whole = whole_jpeg(tmp_path)
        path.write_bytes({"text": b"no image", "empty": b"", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(DataError, match=r"bad\.tiff cannot be decoded \("):
        read_image(path)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a named pipe"),
        (Path.mkdir, "a folder"),
        (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "a socket"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
@pytest.mark.timeout(30)
def test_only_regular_files_are_opened(tmp_path, make, kind):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(DataError, match=rf"a\.png is not a regular file but {kind}\.$"):
        read_image(path)
    with pytest.raises(DataError, match=kind):
        ImageCache(tmp_path / "cache", image_size=100, max_size=200, max_bytes=10**6).read(path)


@pytest.mark.timeout(30)
def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    path, file = tmp_path / "a.png", tmp_path / "b.png"
    file.write_bytes(b"x")
    status = file.stat()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self: status)
    with pytest.raises(DataError, match="is not a regular file but a named pipe"):
        read_bytes(path)


def test_a_link_to_a_file_is_followed(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    assert np.array_equal(pixels(tmp_path / "b.png"), COLOURS)


@pytest.mark.parametrize("step", ["stat", "open"])
def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path, monkeypatch, step):
    path = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(path)

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(*((Path, "stat") if step == "stat" else (os, "open")), refuse)
    with pytest.raises(DataError, match=r"a\.png cannot be read \(Permission denied\)\.$"):
        read_image(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.png does not exist\."):
        read_image(tmp_path / "none.png")


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16"])
def test_an_opened_image_is_seen_as_its_file(tmp_path, mode):
    path = tmp_path / f"a.{'tiff' if mode == 'CMYK' else 'png'}"
    image = Image.fromarray(GRADIENT) if mode == "I;16" else Image.fromarray(COLOURS).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(COLOURS[:, :, 0]))
    image.save(path)
    with Image.open(path) as opened:
        assert torch.equal(to_pixels(opened), read_image(path))


def test_an_opened_image_is_not_turned(tmp_path):
    path, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS).save(path, exif=exif)
    assert read_image(path).shape == (3, 36, 24)
    with Image.open(path) as opened:
        assert np.array_equal(to_pixels(opened).permute(1, 2, 0), COLOURS)
