"""The instances of a job, chosen by the number of GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sagemaker_entry.protocol.instances import DEFAULT_TYPE, INSTANCES, Instance, full_type_name
from sagemaker_entry.protocol.problem import Problem


@dataclass(frozen=True)
class Compute:
    """The instances of a job, all of one type.

    Attributes:
        instance_type: such as "ml.g5.2xlarge".
        count: the number of instances.
        instance: GPUs, memory and price of one instance.
        notes: what the user may not expect, one sentence each.
    """

    instance_type: str
    count: int
    instance: Instance
    notes: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """The number of GPUs of all instances together."""
        return self.count * self.instance.gpus

    @property
    def price(self) -> float | None:
        """Dollars an hour on demand for all instances together; None where the price is not known."""
        return None if self.instance.price is None else self.count * self.instance.price


def choose_compute(
    *,
    gpus: int | None,
    instance_type: str | None,
    count: int | None,
    wanted: int,
    known: dict[str, Instance] | None = None,
) -> Compute:
    """Choose the instances for a number of GPUs, with a note for everything that the user may not expect.

    Args:
        gpus: the user's --gpus.
        instance_type: the user's --instance-type.
        count: the user's --instance-count.
        wanted: the GPUs that the configuration is made for, used without --gpus.
        known: the known instance types; `INSTANCES` by default.

    Raises:
        Problem: an unknown instance type, or options that contradict each other.
    """
    known = INSTANCES if known is None else known
    type_name = full_type_name(instance_type or DEFAULT_TYPE)
    instance = known.get(type_name)
    if instance is None:
        raise Problem(
            f"There is no instance type {type_name} with a known number of GPUs; choose one of {', '.join(known)}."
        )
    if (gpus is not None and gpus < 1) or (count is not None and count < 1):
        raise Problem("--gpus and --instance-count must be at least 1.")
    if gpus is not None and count is not None and gpus != count * instance.gpus:
        raise Problem(
            f"--gpus {gpus} and --instance-count {count} contradict each other: {count} x {type_name} "
            f"{_have(count)} {count * instance.gpus} {instance.gpu}; remove one of the two."
        )
    asked = gpus or wanted
    if count is None:
        count = math.ceil(asked / instance.gpus)
    total = count * instance.gpus
    notes: list[str] = []
    if count > 1 and instance.gpus == 1:
        notes.append(
            f"An {type_name} has ONE {instance.gpu}: {total} GPUs are {count} instances, and each of them is billed."
        )
    if total < wanted:
        notes.append(
            f"The configuration is made for {wanted} GPUs, but {count} x {type_name} {_have(count)} only {total}: "
            f"training takes about {wanted / total:g} times as long; --gpus {wanted} gives all of them."
        )
    elif total > asked:
        notes.append(
            f"{count} x {type_name} {_have(count)} {total} GPUs, not {asked}: training uses all, since all are billed."
        )
    if total != wanted:
        notes.append(
            f"The global batch changes from {wanted} to {total} times data.batch_size; change "
            "--data.batch_size or --model.lr if that matters."
        )
    return Compute(type_name, count, instance, tuple(notes))


def _have(count: int) -> str:
    return "have" if count > 1 else "has"
