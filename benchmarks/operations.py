"""Operations of a training step, by part: `python -m benchmarks operations`.

A count, not a time: nothing is computed, the tensors only have shapes, so it is the same on every machine and at every
size. Each operation is one launch on a GPU, or a few; views and memory requests are none, and deformable attention and
residual norms are one each way, as their kernels are. R50 4-scale, by default in bfloat16, with images of different
sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import environment, save, table
from benchmarks.peers import random_batch
from benchmarks.step import OurStep
from dino_lightning.cli.command import HelpFormatter
from dino_lightning.losses import matcher
from dino_lightning.model import residual_norm
from dino_lightning.model.deformable_attention import dispatch
from dino_lightning.structures import Batch

# Requests for memory and questions about it: no launches.
NO_LAUNCHES = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
NO_LAUNCHES |= {"aten::_unsafe_view", "aten::detach", "aten::sym_size", "prim::device"}


class Launches(TorchDispatchMode):
    """Counts the operations of each part that launch something on a GPU, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Counter[str]] = {}
        self.part = ["rest of forward"]
        self.gradients_copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, returns = func._schema.name, func._schema.returns
        is_view = bool(returns) and all(out.alias_info and not out.alias_info.is_write for out in returns)
        self.gradients_copied += name == "aten::new_empty_strided" and self.part[-1] == "backward"
        if not is_view and name not in NO_LAUNCHES and not name.startswith("profiler::"):
            self.parts.setdefault(self.part[-1], Counter())[name] += 1
        return func(*args, **(kwargs or {}))

    def watch(self, module: nn.Module, name: str) -> None:
        """Count what a module does as a part of that name."""
        module.register_forward_pre_hook(lambda *_: self.part.append(name))
        module.register_forward_hook(lambda *_: self.part.pop() and None)

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A function whose operations count as a part of that name."""

        def counted(*given: Any) -> Any:
            with self.during(name):
                return function(*given)

        return counted

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count what happens here as a part of that name."""
        self.part.append(name)
        yield
        self.part.pop()


def launches(height: int, width: int, size: int, precision: str = "bf16") -> dict[str, Counter[str]]:
    """The operations of one training step after the first, by part and name.

    Args:
        height: of the canvas, in pixels.
        width: of the canvas, in pixels.
        size: images in the batch; each is a little smaller than the one before.
        precision: `bf16`, `fp16` or `fp32`.
    """
    whole = random_batch(height, width, size, "cpu")
    sizes = tuple((height - 8 * index, width - 16 * index) for index in range(size))
    batch = dataclasses.replace(whole, image_sizes=sizes)
    arbitrary = np.random.default_rng(0)
    count = Launches()
    with (
        FakeTensorMode(allow_non_fake_inputs=True) as fake,
        mock.patch.object(dispatch, "_takes_kernel", lambda *_: True),
        mock.patch.object(residual_norm, "_takes_kernel", lambda *_: True),
        mock.patch.object(
            matcher, "to_host_later", lambda cost: lambda: arbitrary.random(cost.shape, dtype=np.float32)
        ),
    ):
        step = OurStep([_as_fake(batch, fake)], "cpu", precision)
        model, criterion = step.model, step.criterion
        for name in ("backbone", "neck", "encoder", "query_selection", "decoder"):
            count.watch(model.get_submodule(name), name.replace("_", " "))
        count.watch(criterion, "loss")
        criterion.matcher.launch = count.watched(criterion.matcher.launch, "match")
        step()  # frozen layers are folded and the optimizer makes its state in the first
        with count:
            loss = step.forward()
            with count.during("backward"):
                loss.backward()
            with count.during("optimizer"):
                step.update()
    # While operations are watched, autograd copies gradients that it takes over otherwise, each into new memory.
    count.parts["backward"]["aten::copy_"] -= count.gradients_copied
    return count.parts


def _as_fake(batch: Batch, fake: FakeTensorMode) -> Batch:
    with mock.patch("dino_lightning.structures._copy_to", lambda tensor, _: fake.from_tensor(tensor)):
        return batch.to("cpu")


def main() -> None:
    """Count and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks operations",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--size", default="800x1333", help="height x width")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="bf16")
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    parts = launches(height, width, options.batch_size, options.precision)
    rows = [("part", "operations", "most of them")]
    for name, counts in parts.items():
        most = ", ".join(f"{what.removeprefix('aten::')} {number}" for what, number in counts.most_common(4))
        rows.append((name, str(counts.total()), most))
    total = sum(counts.total() for counts in parts.values())
    print(table([*rows, ("all", str(total), "")]))
    if options.output is not None:
        result = {name: dict(counts) for name, counts in parts.items()}
        save(options.output, {"environment": environment(), "total": total, "result": result})


if __name__ == "__main__":
    main()
