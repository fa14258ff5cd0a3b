"""Images per second of `predict` as a share of what its model alone does: `python -m benchmarks predict`.

The model alone: the same weights, precision, batch size and threads, one batch after another, on images that lie in
memory decoded and resized, to detections above the threshold. `predict` reads, resizes, detects, draws and writes files
from and to a folder; its seconds are those that it says itself, without loading the model. In turns, with and without
pictures, on drawn plans as PNG and as JPEG files.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import environment, save, table
from dino_lightning.data.images import read_image
from dino_lightning.data.transforms import LabelledImage
from dino_lightning.floor_plans import write_rooms_dataset
from dino_lightning.inference.detector import load_module
from dino_lightning.inference.predict_folder import PredictOptions, predict_folder
from dino_lightning.structures import Batch
from dino_lightning.training.module import DINOModule
from dino_lightning.weights.reading import find_model

ALONE = "the model alone"


def plans_as(folder: Path, suffix: str, pages: Sequence[Path]) -> Path:
    """A folder with the same pages, all as PNG or all as JPEG files."""
    made = folder / suffix
    made.mkdir()
    for page in pages:
        with Image.open(page) as image:
            image.convert("RGB").save(made / f"{page.stem}.{suffix}", quality=90)
    return made


def in_memory(module: DINOModule, folder: Path) -> list[tuple[Tensor, tuple[int, int]]]:
    """Each image as the model sees it, (3, h, w) uint8, and the (height, width) of its file."""
    transform, images = module.eval_transform(), []
    for path in sorted(folder.iterdir()):
        pixels = read_image(path)
        labelled = LabelledImage(pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        images.append((transform(labelled).image.contiguous(), (int(pixels.shape[1]), int(pixels.shape[2]))))
    return images


@torch.no_grad()
def rate_alone(module: DINOModule, images: Sequence[tuple[Tensor, tuple[int, int]]], batch_size: int) -> float:
    """Images per second of the model alone; batches are of one shape, as in `predict`."""
    by_shape: dict[tuple[int, ...], list[tuple[Tensor, tuple[int, int]]]] = {}
    for image in images:
        by_shape.setdefault(tuple(image[0].shape), []).append(image)
    groups = [
        group[first : first + batch_size] for group in by_shape.values() for first in range(0, len(group), batch_size)
    ]
    start = time.perf_counter()
    for group in groups:
        batch = Batch.from_images([pixels for pixels, _ in group], original_sizes=[size for _, size in group])
        for detections in module(batch.to(module.device)):
            detections.cpu().above(module.score_threshold)
    return len(images) / (time.perf_counter() - start)


def rate_of_predict(checkpoint: Path, images: Path, output: Path, options: argparse.Namespace, pictures: bool) -> float:
    """Images per second of `predict`, from its own clock."""
    wanted = PredictOptions(
        images=[str(images)],
        output=output,
        overwrite=True,
        overlays=pictures,
        accelerator=options.device,
        devices="1",
        precision="32-true",
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )
    summary = predict_folder(checkpoint, wanted)
    assert summary is not None and not summary.failed
    return summary.done_now / summary.seconds


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks predict", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt_path", default="rooms_small", help="a checkpoint, or rooms_small")
    parser.add_argument("--images", type=int, default=500, help="drawn plans (500)")
    parser.add_argument("--size", type=int, help="long side of the plans in pixels (of many sizes)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--num_workers", type=int, help="processes that read images (as predict chooses)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    checkpoint = find_model(options.ckpt_path)
    module = load_module(checkpoint).to(options.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = write_rooms_dataset(
            folder / "drawn", num_train=options.images, num_val=1, style="realistic", size=options.size
        )
        pages = sorted((drawn / "train" / "images").iterdir())
        folders = {suffix: plans_as(folder, suffix, pages) for suffix in ("jpg", "png")}
        images = in_memory(module, folders["png"])
        rate_alone(module, images[:8], options.batch_size)
        rates: dict[str, list[float]] = {ALONE: []}
        for _ in range(options.rounds):
            rates[ALONE].append(rate_alone(module, images, options.batch_size))
            for suffix, plans in folders.items():
                for pictures in (False, True):
                    case = f"predict, {suffix.upper()}, {'with' if pictures else 'without'} pictures"
                    found = rate_of_predict(checkpoint, plans, folder / "found", options, pictures)
                    rates.setdefault(case, []).append(found)
    results: dict[str, Any] = {}
    rows = [("", "images/s", "of the model alone", "spread")]
    for case, values in rates.items():
        shares = [value / alone for value, alone in zip(values, rates[ALONE], strict=True)]
        share, middle = statistics.median(shares), statistics.median(values)
        results[case] = {"images_per_second": middle, "share": share, "rounds": values}
        rows.append((case, f"{middle:.1f}", f"{share:.0%}", f"{min(shares):.0%} to {max(shares):.0%}"))
    print(
        f"{options.images} plans, {options.device}, {torch.get_num_threads()} threads, "
        f"batches of {options.batch_size}, {options.rounds} rounds in turns\n\n{table(rows)}"
    )
    if options.output is not None:
        save(options.output, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
