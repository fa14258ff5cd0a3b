"""A cheaper choice of instances beside the default one: the same type with fewer of them, which exchange less."""

from __future__ import annotations

from sagemaker_entry.laptop.compute import Compute
from sagemaker_entry.laptop.estimate import Work, estimate_hours
from sagemaker_entry.laptop.plan import about

WORTH_SAYING = 0.05  # of the cost


def cheaper_choice(work: Work, compute: Compute, hours: float) -> str | None:
    """The cheapest smaller number of instances, in words; None where it saves too little or has no known price.

    Args:
        work: the size of the training.
        compute: the instances of the plan.
        hours: the likely hours of the plan, measured or estimated, from which time and cost of the other follow.
    """
    if compute.price is None:
        return None
    before = estimate_hours(work, compute)[1]
    found: list[tuple[float, float, Compute]] = []
    for count in range(1, compute.count):
        other = Compute(compute.instance_type, count, compute.instance)
        assert other.price is not None
        time = estimate_hours(work, other)[1] / before
        found.append((time * other.price / compute.price, time, other))
    if not found:
        return None
    cost, time, other = min(found, key=lambda choice: choice[0])
    if cost > 1 - WORTH_SAYING:
        return None
    batch = work.on(other.gpus).batch_size * other.gpus * work.length.accumulate_grad_batches
    return (
        f"{other.count} x {other.instance_type} (--instance-count {other.count}): about "
        f"{about(cost * hours * compute.price)}, {1 - cost:.0%} less, and {time - 1:.0%} more time (about "
        f"{time * hours:.1f} hours); the global batch is then {batch}"
    )
