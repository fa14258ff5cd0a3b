"""`DINOCLI(run=False)`: options, model, data and Trainer as for `fit`, to be run by the user's own lines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from dino_lightning.callbacks.rank_watchdog import watch_first_process
from dino_lightning.cli import run_folder
from dino_lightning.cli.arguments import prepare
from dino_lightning.cli.quiet import quiet
from dino_lightning.errors import UsageError

# Options of commands, and what takes their place.
OF_COMMANDS = {
    "--ckpt_path": "give the checkpoint to trainer.fit, trainer.validate or trainer.test",
    "--overwrite": "remove the folder, or give another --run_dir",
}


def prepare_by_hand(args: Sequence[str], commands: Sequence[str]) -> tuple[list[str], Path]:
    """The options for the parser, and the folder that a run would have, which is not made.

    Args:
        args: options, without a command.
        commands: the names of commands.

    Raises:
        UsageError: a command, an option of commands, or a folder that holds the results of another run.
    """
    if args and args[0] in commands:
        raise UsageError(f"With run=False nothing is run: leave out {args[0]}, and give its options alone.")
    for name, instead in OF_COMMANDS.items():
        if any(arg.partition("=")[0] == name for arg in args):
            raise UsageError(f"With run=False there is no {name}: {instead}.")
    watch_first_process()
    prepared, run_dir = prepare("fit", list(args), make_folder=False)
    run_folder.refuse_results(run_dir)
    return prepared, run_dir


class RunTrainer(Trainer):
    """A Trainer that holds the folder of its run while it runs, as the commands do.

    Attributes:
        run_dir: that folder; None before it is known.
    """

    run_dir: Path | None = None
    _begun = False

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        with self._in_its_folder("fit"):
            return super().fit(*args, **kwargs)

    def validate(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        with self._in_its_folder("validate"):
            return super().validate(*args, **kwargs)

    def test(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        with self._in_its_folder("test"):
            return super().test(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class."""
        with self._in_its_folder("predict"):
            return super().predict(*args, **kwargs)

    @contextmanager
    def _in_its_folder(self, action: str) -> Iterator[None]:
        """Lock the folder, and tell it to the processes that are started inside; at first it must be free of results.

        Raises:
            UsageError: see `run_folder.hold`.
        """
        assert self.run_dir is not None
        with quiet(action), ExitStack() as held:
            if self._begun:
                run_folder.hold_again(self.run_dir, held)
            else:
                run_folder.hold(self.run_dir, None, held, overwrite=False)
                self._begun = True
            held.enter_context(run_folder.shared(self.run_dir))
            yield
