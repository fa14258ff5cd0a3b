"""Jobs without a network: what would need one is refused before the upload."""

from __future__ import annotations

from sagemaker_entry.laptop.training_config import Training
from sagemaker_entry.protocol.problem import Problem


def check_isolation(training: Training) -> None:
    """Check that a job with --network-isolation finds in its channels all that it reads.

    Raises:
        Problem: the container would download weights.
    """
    for option, place in training.fetched.items():
        if option == "model.weights" and "://" not in place:
            advice = f"`python -m dino_lightning weights get {place}` first, and they go along"
        else:
            advice = f"download them and give the file, as --{option}=FILE, or null for none"
        raise Problem(
            f"--network-isolation: the container cannot fetch --{option}={place}, for it has no network; {advice}."
        )
