"""Ctrl-C, once and twice, at one stage of every command; `python -m tests.cli.interrupts` tries all stages."""

import pytest

from tests.cli.interrupted_commands import CHECK, LOAD, MATRIX, SAVE, STEP
from tests.cli.interrupts import Interrupts

SAMPLE = {
    "fit": CHECK,
    "fit, 2 processes": CHECK,
    "validate": CHECK,
    "test": "argparse",
    "predict": "exit",
    "export": LOAD,
    "convert": SAVE,
    "inspect": "argparse",
    "preview": "argparse",
    "rooms": "PIL.Image:Image.save",
    "weights": "dino_lightning.weights.transfer:_read",
    "to_coco": "argparse",
    "launch --local": STEP,
    "launch --dry-run": "argparse",
}


@pytest.fixture(scope="module")
def interrupts(tmp_path_factory):
    return Interrupts(tmp_path_factory.mktemp("interrupts"))


@pytest.mark.slow
@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("name", SAMPLE)
def test_ctrl_c_is_one_sentence(interrupts, name, presses):
    outcome = interrupts.run(MATRIX[name], SAMPLE[name], presses)
    assert outcome is not None and not outcome.wrong, (outcome.wrong, outcome.said)
