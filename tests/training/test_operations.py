"""A training step is few operations: on a GPU each is a launch, and small batches wait for launches."""

import pytest

from benchmarks.operations import launches


@pytest.mark.slow
def test_operations_of_a_step():
    parts = {name: counts.total() for name, counts in launches(320, 320, 2).items()}
    assert parts["backbone"] <= 200, "frozen norms are folded once"
    assert sum(parts.values()) <= 2400
