"""The commands `validate` and `test`: evaluate a checkpoint on a split, with a report."""

from __future__ import annotations

from collections.abc import Sequence

from dino_lightning.cli.command import run_command
from dino_lightning.cli.help_pages import help_page


def validate(args: Sequence[str]) -> int:
    """Evaluate on the validation split; returns the exit code."""
    return _evaluate("validate", args)


def test(args: Sequence[str]) -> int:
    """Evaluate on the test split; returns the exit code."""
    return _evaluate("test", args)


def _evaluate(command: str, args: Sequence[str]) -> int:
    page = help_page(command, args)
    if page is not None:
        print(page)
        return 0

    def action() -> int:
        from dino_lightning.cli.running import run_subcommand  # takes seconds to import

        return run_subcommand(command, args)

    return run_command(action)
