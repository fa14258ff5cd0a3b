"""CPU seconds and memory of reading a file as large as COCO's: `python -m benchmarks annotations`.

The file is made by this script: 118,287 images, 860,001 boxes with polygons of 22 points. Each contestant reads it in a
process of its own; its peak is over that of its imports.

- pycocotools: `COCO(file)`.
- ours: `load_coco`, without a cache.
- ours, again: the same from the cache, as the second process of a machine does.

Then a loader worker is forked, looks at every image and box, and says how much memory it has for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from benchmarks.measure import environment, save, table

IMAGES, BOXES, POINTS, CLASSES = 118_287, 860_001, 22, 80
START = "import resource, time, sys, json\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
END = "print(json.dumps({'seconds': time.process_time() - begin, 'megabytes': peak() - before}))\n"
READERS = {
    "pycocotools": (
        "import contextlib, io\nfrom pycocotools.coco import COCO\n",
        "with contextlib.redirect_stdout(io.StringIO()):\n    found = COCO(sys.argv[1])\n",
    ),
    "ours": (
        "import torch, msgspec\nfrom pathlib import Path\nfrom dino_lightning.data import load_coco\n",
        "found = load_coco(Path(sys.argv[1]), Path(sys.argv[1]).parent / 'images')\n",
    ),
}
WORKER = """
import os
lines = lambda: [line.split() for line in open('/proc/self/smaps_rollup')]
private = lambda: sum(int(words[1]) for words in lines() if words[0] == 'Private_Dirty:')
child = os.fork()
if child == 0:
    before = private()
    total = 0.0
    for index in range(len(found.images)):
        image = found.images[index]
        rows = slice(found.offsets[index], found.offsets[index + 1])
        total += image.size[0] + len(image.file_name) + found.boxes_xyxy[rows].sum()
    print(json.dumps({'worker_megabytes': (private() - before) / 1024}), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def write(path: Path, images: int, boxes: int) -> None:
    """A file like COCO's, seeded."""
    draw = random.Random(0)
    with path.open("w") as file:
        file.write('{"info":{"year":2017},"licenses":[],"images":[')
        for number in tqdm(range(1, images + 1), "images", leave=False):
            name = f"{number:012d}.jpg"
            entry = {
                "license": 3, "file_name": name, "coco_url": f"http://images.example.org/train2017/{name}",
                "height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": number,
                "flickr_url": f"http://farm9.example.org/8186/{number}.jpg",
            }  # fmt: skip
            file.write(("," if number > 1 else "") + json.dumps(entry))
        file.write('],"annotations":[')
        for number in tqdm(range(1, boxes + 1), "boxes", leave=False):
            x, y = draw.random() * 500, draw.random() * 380
            width, height = 10 + draw.random() * 100, 10 + draw.random() * 90
            outline = [
                round(value, 2)
                for _ in range(POINTS)
                for value in (x + draw.random() * width, y + draw.random() * height)
            ]
            outline[:4] = [round(x, 2), round(y, 2), round(x + width, 2), round(y + height, 2)]
            annotation = {
                "segmentation": [outline], "area": round(width * height * 0.6, 4), "iscrowd": 0,
                "image_id": draw.randint(1, images), "category_id": draw.randint(1, CLASSES), "id": number,
                "bbox": [round(x, 2), round(y, 2), round(width, 2), round(height, 2)],
            }  # fmt: skip
            file.write(("," if number > 1 else "") + json.dumps(annotation))
        categories = [
            {"supercategory": "", "id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)
        ]
        file.write(f'],"categories":{json.dumps(categories)}}}')


def measure(reader: str, path: Path, cache: Path, *, worker: bool = False) -> dict[str, float]:
    """Run one reader in a process of its own; the numbers it prints."""
    imports, read = READERS[reader]
    code = START + imports + "before, begin = peak(), time.process_time()\n" + read + END + (WORKER if worker else "")
    environ = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environ, stdout=subprocess.PIPE, text=True, check=True
    )
    numbers: dict[str, float] = {}
    for line in done.stdout.splitlines():
        numbers |= json.loads(line)
    return numbers


def main() -> None:
    """Run the measurement and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks annotations", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--boxes", type=int, default=BOXES)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {"pycocotools": [], "ours": [], "ours, again": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotations.json"
        write(path, options.images, options.boxes)
        size = path.stat().st_size / 1e6
        for number in tqdm(range(options.rounds), "rounds"):
            cache = Path(folder) / f"cache{number}"
            results["pycocotools"].append(measure("pycocotools", path, cache))
            results["ours"].append(measure("ours", path, cache))
            results["ours, again"].append(measure("ours", path, cache, worker=True))
    rows = [("reader", "CPU seconds", "MB at the peak", "MB of a worker's own")]
    for name, rounds in results.items():
        seconds = sorted(one["seconds"] for one in rounds)
        worker = [one["worker_megabytes"] for one in rounds if "worker_megabytes" in one]
        rows.append(
            (
                name,
                f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})",
                f"{statistics.median(one['megabytes'] for one in rounds):.0f}",
                f"{statistics.median(worker):.1f}" if worker else "",
            )
        )
    print(f"{options.images:,} images, {options.boxes:,} boxes, {size:.0f} MB; {options.rounds} rounds\n")
    print(table(rows))
    if options.output is not None:
        save(options.output, {"environment": environment(), "megabytes of the file": size, "results": results})


if __name__ == "__main__":
    main()
