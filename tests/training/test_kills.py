"""Runs that are killed again and again, anywhere, end as if nothing had happened."""

from collections import Counter

import pytest

from tests.training.kills import kill_runs, write_plans


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "wanted", "seed"), [(1, 22, 0), (2, 10, 1)])
def test_killed_runs_end_like_those_that_were_not(tmp_path, processes, wanted, seed):
    stages, runs = kill_runs(write_plans(tmp_path), tmp_path, processes=processes, wanted=wanted, seed=seed)
    print(f"killed {len(stages)} times in {runs} runs: {sorted(Counter(stages).items())}")
