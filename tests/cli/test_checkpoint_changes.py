"""No structural change of a checkpoint ends in a traceback or passes in silence."""

from collections import Counter

import pytest

from tests.cli.checkpoint_changes import ALL, Fuzz

TRAINING = ("optimizer", "exp_avg", "step", "loop", "progress", "completed", "EMA", "Stopping", "callback", "history")
GOOD = {"refused", "told", "harmless"}
OTHERS = tuple(command for command in ALL if command != "load_detector")


@pytest.mark.slow
def test_a_changed_checkpoint_is_refused_told_or_as_good(rooms, tmp_path):
    """All through `load_detector`, each ninth through one way more, a third of those of training through `resume`."""
    fuzz, counts, bad = Fuzz(rooms, tmp_path), Counter(), []
    assert len(fuzz.names) > 170
    for index, name in enumerate(fuzz.names):
        commands = ["load_detector"]
        if index % 9 == 0:
            commands.append(OTHERS[index // 9 % len(OTHERS)])
        elif any(word in name for word in TRAINING) and index % 3 == 0:
            commands.append("resume")
        for command, (verdict, lines) in fuzz.try_all(name, commands).items():
            counts[verdict] += 1
            if verdict not in GOOD:
                bad.append((verdict, command, name, lines[-2:]))
    assert not bad
    assert all(counts[verdict] > 10 for verdict in GOOD)
