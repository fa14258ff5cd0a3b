"""Images per second and core, from the file to the tensors that go to the device: `python -m benchmarks data`.

The training pipeline without augmentation compared with two others; each reads the same files from disk:

- published: our own plain formulation of what the published code does: Pillow decodes, Pillow resizes, then
  float32 and normalisation on the CPU.
- torchvision: like its reference scripts for detection with tensors: decode, resize, float32, normalisation.
- ours: `CocoDetection`, uint8 throughout (normalisation is on the device), boxes included.
- cached: the same with `cache_dir`, after the first epoch.

Seconds are CPU seconds of the single worker thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as v2
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import functional as v1
from tqdm import tqdm

from benchmarks.measure import environment, interleaved, save, table
from dino_lightning.data import CocoDataModule, CocoDetection
from dino_lightning.data.sizes import resized_size
from dino_lightning.floor_plans import write_rooms_dataset

SHORT_SIDE, LONG_SIDE = 800, 1333
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CASES = ("480x640 JPEG", "1200x2000 JPEG", "3508x4961 plan JPEG", "3508x4961 plan PNG")
BASELINE = "published"


def published(path: Path) -> Tensor:
    """(3, h, w) float32, normalised."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    resized = v1.resize(image, list(resized_size((image.height, image.width), SHORT_SIDE, LONG_SIDE)))
    return v1.normalize(v1.to_tensor(resized), MEAN, STD)


def torchvision_reference(path: Path) -> Tensor:
    """(3, h, w) float32, normalised."""
    image = decode_image(str(path), ImageReadMode.RGB)
    size = resized_size((image.shape[1], image.shape[2]), SHORT_SIDE, LONG_SIDE)
    pixels = v2.to_dtype(v2.resize(image, list(size), antialias=True), torch.float32, scale=True)
    return v2.normalize(pixels, MEAN, STD)


def photo(height: int, width: int, seed: int) -> Image.Image:
    """An image that compresses like a photograph: soft areas, edges, texture, a little noise."""
    draws = np.random.default_rng(seed)
    soft = Image.fromarray(draws.integers(0, 256, (height // 60, width // 60, 3), dtype=np.uint8))
    image = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    texture = Image.fromarray(draws.integers(96, 160, (height // 3, width // 3), dtype=np.uint8))
    textured = np.asarray(texture.resize((width, height)).filter(ImageFilter.GaussianBlur(1.5))).astype(np.int16) - 128
    for _ in range(40):
        top, left = int(draws.integers(height)), int(draws.integers(width))
        shade = draws.integers(-60, 60, 3)
        image[top : top + height // 5, left : left + width // 5] += shade.astype(np.int16)
    image += textured[:, :, None] + draws.integers(-3, 4, (height, width, 1)).astype(np.int16)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def plan(folder: Path, seed: int) -> Image.Image:
    """A scanned plan of 3508 x 4961 pixels (A3 at 300 dpi)."""
    write_rooms_dataset(folder, num_train=1, num_val=1, style="realistic", seed=seed, size=4961)
    with Image.open(next((folder / "train/images").iterdir())) as page:
        return page.convert("RGB").resize((3508, 4961))


def write_images(root: Path, case: str, count: int) -> list[Path]:
    """The files of a case, with annotations of one box each."""
    images = root / "train"
    images.mkdir(parents=True)
    size, suffix = case.split()[0], case.split()[-1].lower().replace("jpeg", "jpg")
    paths = []
    for number in range(1, count + 1):
        height, width = (int(side) for side in size.split("x"))
        if "plan" in case:
            picture, (width, height) = plan(root / "rooms" / str(number), number), (height, width)
            picture = picture.resize((width, height)) if picture.size != (width, height) else picture
        else:
            picture = photo(height, width, number)
        paths.append(images / f"{number}.{suffix}")
        picture.save(paths[-1], quality=90) if suffix == "jpg" else picture.save(paths[-1])
    entries = [{"id": n, "file_name": path.name, "width": width, "height": height} for n, path in enumerate(paths, 1)]
    boxes = [
        {"id": entry["id"], "image_id": entry["id"], "category_id": 1, "bbox": [9, 9, 90, 70]} for entry in entries
    ]
    document = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "room"}]}
    (images / "annotations.json").write_text(json.dumps(document), encoding="utf-8")
    return paths


def dataset(root: Path, cache: Path | None = None) -> CocoDetection:
    """The training dataset of all images of a case, without augmentation."""
    data = CocoDataModule(
        root=str(root),
        augmentation="none",
        image_size=SHORT_SIDE,
        max_size=LONG_SIDE,
        cache_dir=None if cache is None else str(cache),
        val_annotations=str(root / "train/annotations.json"),
        val_images=str(root / "train"),
    )
    return data.train_set


def through(read: Callable[[int], object], count: int) -> None:
    """Read all images of a case once."""
    for index in range(count):
        read(index)


def largest_difference(paths: list[Path], samples: CocoDetection) -> float:
    """Mean distance in grey levels between our pixels and the published ones, of the worst image."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return max(
        float((samples[index].image - (published(path) * std + mean) * 255).abs().mean())
        for index, path in enumerate(paths)
    )


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=4, help="images of each kind")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="The image decoding")
    torch.set_num_threads(1)
    rows = [("images", "pipeline", "images/s/core", "ms/image", "spread", "ratio", "grey levels off")]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in tqdm(CASES, "cases"):
            root = Path(folder) / case.replace(" ", "_")
            paths = write_images(root, case, options.images)
            plain, cached = dataset(root), dataset(root, Path(folder) / "cache")
            contestants = {
                BASELINE: partial(through, lambda i, p=paths: published(p[i]), len(paths)),
                "torchvision": partial(through, lambda i, p=paths: torchvision_reference(p[i]), len(paths)),
                "ours": partial(through, plain.__getitem__, len(paths)),
                "cached": partial(through, cached.__getitem__, len(paths)),
            }
            timings = interleaved(contestants, rounds=options.rounds, clock=time.thread_time)
            off = {"ours": largest_difference(paths, plain), "cached": largest_difference(paths, cached)}
            results[case] = {
                "bytes per file": [path.stat().st_size for path in paths],
                "grey levels off": off,
                "ratio": {name: timings[BASELINE].median / timing.median for name, timing in timings.items()},
                "seconds for all images": {name: timing.as_json() for name, timing in timings.items()},
            }
            for name, timing in timings.items():
                seconds = timing.median / len(paths)
                rows.append(
                    (
                        case if name == BASELINE else "",
                        name,
                        f"{1 / seconds:.1f}",
                        f"{seconds * 1e3:.2f}",
                        f"{timing.spread:.0%}",
                        f"{timings[BASELINE].median / timing.median:.1f}x",
                        f"{off[name]:.2f}" if name in off else "",
                    )
                )
    print(f"short side {SHORT_SIDE}, long side at most {LONG_SIDE}; {options.images} images, {options.rounds} rounds\n")
    print(table(rows))
    if options.output is not None:
        save(options.output, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
