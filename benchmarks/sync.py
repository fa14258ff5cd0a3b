"""Operations and device synchronisations in a training step: `python -m benchmarks sync`.

A count, not a time: it is the same on every machine, and shows on a CPU what would synchronise on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import plain
from benchmarks.measure import environment, save, table
from benchmarks.peers import random_batch
from benchmarks.step import OurStep
from dino_lightning.structures import ModelOutput, Targets

WAITING_OPERATORS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
WAITING_METHODS = {"cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__"}


class Operators(TorchDispatchMode):
    """Counts all operators, and those that synchronise with the device."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.synchronisations = 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        if func._schema.name in WAITING_OPERATORS:
            self.synchronisations[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Counts calls that copy to the host; on a CPU they do not reach an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronisations = Counter[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITING_METHODS:
            self.synchronisations[name] += 1
        return func(*args, **(kwargs or {}))


class PlainCriterion(torch.nn.Module):
    """Matching and losses the published way, layer by layer."""

    def forward(self, output: ModelOutput, targets: Targets) -> dict[str, torch.Tensor]:
        """The weighted loss."""
        return {"loss": plain.total_loss(output, targets)}


def count(step: OurStep) -> dict[str, Any]:
    """Number of operators and of synchronisations in one step."""
    step()  # the optimizer makes its state in the first
    with Operators() as operators, Methods() as methods:
        step()
    # `item` and its operator are one; those that only the operators show happen inside PyTorch's own code
    synchronisations = methods.synchronisations["cpu"] + max(
        operators.synchronisations.total(), methods.synchronisations.total() - methods.synchronisations["cpu"]
    )
    return {
        "operators": operators.all,
        "synchronisations": synchronisations,
        "seen": dict(operators.synchronisations + methods.synchronisations),
    }


def main() -> None:
    """Count and print a table; `--output` writes the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sync", description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="320x320", help="height x width")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the numbers to this JSON file")
    options = parser.parse_args()
    height, width = (int(side) for side in options.size.split("x"))
    batches = [random_batch(height, width, options.batch_size, "cpu")]
    results = {}
    for name in ("dino_lightning", "losses layer by layer"):
        step = OurStep(batches, "cpu", "fp32")
        if name != "dino_lightning":
            step.criterion = PlainCriterion()  # type: ignore[assignment]  # a stand-in
        results[name] = count(step)
    rows = [("", "operators", "synchronisations", "seen as")]
    rows += [
        (name, str(one["operators"]), str(one["synchronisations"]), str(one["seen"])) for name, one in results.items()
    ]
    print(table(rows))
    if options.output is not None:
        save(options.output, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()
