"""The folder of a run is its own: a name that no other run has, a lock while it runs, nothing replaced unasked."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dino_lightning.callbacks.rank_watchdog import FIRST_PROCESS
from dino_lightning.cli.checkpoints import RUNS
from dino_lightning.cli.run_contents import (
    CONFIG,
    ONLY_IN_EVALUATION,
    config_text,
    evaluated,
    evaluations_in,
    identity,
    is_ours,
    left_by_a_run,
    results_in,
    stored_options,
)
from dino_lightning.console import is_first_process, say
from dino_lightning.errors import UsageError
from dino_lightning.files import locked, unwritable

RUN_DIR_VARIABLE = "DINO_LIGHTNING_RUN_DIR"  # tells the processes that Lightning starts their run's folder
LOCK = ".run.lock"

_names_agreed_on = itertools.count()
_names_given: set[Path] = set()  # of folders that may not be made yet


def new_folder(*, make: bool = True) -> Path:
    """A folder in `RUNS` named by the time, made at once so that no other run has it; one for all processes of a job.

    The processes that torchrun starts learn it from the first one. Others than the first write nothing, so under
    another launcher it does no harm that theirs may be named a second later.

    Args:
        make: false for a folder that the run may never need; the number of the process in its name makes it its own.
    """
    key = f"dino_lightning/run_dir/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_names_agreed_on)}"
    store = _store_of_torchrun()
    if not is_first_process():
        return RUNS / _now() if store is None else Path(store.get(key).decode())
    name = _now()
    for number in itertools.count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        if not make:
            folder = folder.with_name(f"{folder.name}-p{os.getpid()}")
            if folder.exists() or folder in _names_given:
                continue
            _names_given.add(folder)
            break
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(folder, error) from error
        break
    if store is not None:
        store.set(key, str(folder))
    return folder


def shared_run_dir() -> Path | None:
    """The folder that the first process of this run chose, in the processes that Lightning started for it."""
    shared = os.environ.get(RUN_DIR_VARIABLE)
    return Path(shared) if shared and "LOCAL_RANK" in os.environ else None


@contextlib.contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Tell the folder, and who has started them, to the processes that are started inside."""
    told = {RUN_DIR_VARIABLE: str(folder), FIRST_PROCESS: str(os.getpid())}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def remove_unused(folder: Path) -> None:
    """Remove a folder that `new_folder` has made, if nothing was put there: the start has failed."""
    if _writes() and folder.parent == RUNS:
        _remove_if_empty(folder)
        _remove_if_empty(RUNS)


def take_overwrite(args: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether `--overwrite` is given, alone or with true or false, and the arguments without it.

    Raises:
        UsageError: it has another value.
    """
    given, rest, left = False, [], list(args)
    while left:
        arg = left.pop(0)
        name, equals, value = arg.partition("=")
        if name != "--overwrite":
            rest.append(arg)
            continue
        if not equals:
            value = left.pop(0) if left and left[0].lower() in ("true", "false") else "true"
        if value.lower() not in ("true", "false"):
            raise UsageError(f"--overwrite {value}: this must be true or false.")
        given = value.lower() == "true"
    return given, rest


def hold(folder: Path, checkpoint: str | None, held: ExitStack, *, overwrite: bool) -> None:
    """Refuse a folder that a training must not have, and lock it until `held` is closed. On the first process only.

    Nothing is changed in it but the lock; when `held` is closed, a folder that was made here and is empty is removed.

    Args:
        folder: for the run.
        checkpoint: the one that is resumed.
        held: closed when the run ends.
        overwrite: the run that the folder holds may be removed; `clear` does it.

    Raises:
        UsageError: another run's results are there, or files that no run wrote; or another run is writing there; or
            the folder cannot be written.
    """
    if not _writes():
        return
    if overwrite and resumes_in(folder, checkpoint):
        raise UsageError(f"--overwrite would remove {checkpoint}, which --ckpt_path resumes: leave out one of the two.")
    if not (folder / LOCK).exists():  # else the run may be going on, which says more
        _refuse(folder, checkpoint, overwrite=overwrite)
    hold_again(folder, held)
    _refuse(folder, checkpoint, overwrite=overwrite)
    if not left_by_a_run(folder):
        held.callback(_remove_failed_start, folder)


def hold_again(folder: Path, held: ExitStack) -> None:
    """Lock a folder, whatever is in it, until `held` is closed. On the first process only.

    Raises:
        UsageError: another run is writing there, or it cannot be written.
    """
    if _writes() and not _lock(folder, held):
        raise UsageError(f"{folder}: another run is writing there; wait for its end, or give another --run_dir.")


def refuse_results(folder: Path) -> None:
    """Refuse a folder that a new training must not have; nothing is changed in it. On the first process only.

    Raises:
        UsageError: another run's results are there, or files that no run wrote.
    """
    if _writes():
        _refuse(folder, None, overwrite=False)


def resumes_in(folder: Path, checkpoint: str | None) -> bool:
    """Whether a checkpoint is one of the run in this folder."""
    if checkpoint is None:
        return False
    paths = (Path(checkpoint).absolute(), Path(checkpoint).resolve())
    return any(place in path.parents for place in (folder.absolute(), folder.resolve()) for path in paths)


def clear(folder: Path) -> None:
    """Remove what an earlier run left, or a start that failed: the files that a run writes, and no others."""
    if not _writes():
        return
    ours = [part for part in evaluations_in(folder) if is_ours(part, config_text(part))]
    for part in [*ours, folder]:
        for path in left_by_a_run(part):
            path.unlink(missing_ok=True)
        for name in ("tensorboard", "report", "checkpoints", "non_finite", ""):
            _remove_if_empty(part / name)
    folder.mkdir(parents=True, exist_ok=True)


def evaluation_folder(folder: Path, command: str) -> Path:
    """Where `validate` and `test` write: not among the results of a training, which they would replace."""
    trained = (folder / "run.json").is_file() or any(folder.glob("checkpoints/*.ckpt"))
    stored = stored_options(config_text(folder))
    return folder / command if trained or (stored is not None and ONLY_IN_EVALUATION not in stored) else folder


def hold_evaluation(folder: Path, options: Mapping[str, Any], held: ExitStack) -> Path:
    """The folder for an evaluation, locked until `held` is closed; with a number if it holds another's results.

    Args:
        folder: where it would be written.
        options: of the evaluation, as parsed; it replaces results of the same checkpoint on the same data.
        held: closed when the evaluation ends.

    Raises:
        UsageError: the folder holds files that no evaluation wrote, or cannot be written.
    """
    if not _writes():
        return folder
    for number in itertools.count(1):
        chosen = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        text = config_text(chosen)
        _refuse_strangers(chosen, text)
        before = evaluated(text)
        if before in (None, identity(options)) and _lock(chosen, held):
            if number > 1:
                say(f"{folder} holds the results of another checkpoint or dataset; these go to {chosen}.\n")
            return chosen
    raise AssertionError("numbers do not end")


def _refuse(folder: Path, checkpoint: str | None, *, overwrite: bool) -> None:
    """Refuse what must not be lost.

    Raises:
        UsageError: there is such a thing.
    """
    if resumes_in(folder, checkpoint):
        return
    _refuse_strangers(folder, config_text(folder))
    results = results_in(folder)
    if results and not overwrite:
        resume = "" if checkpoint or results[0].suffix != ".ckpt" else f"resume it with --ckpt_path {folder}, "
        raise UsageError(
            f"{folder} holds the results of another run ({results[0].relative_to(folder)}): {resume}give another "
            "--run_dir, or --overwrite to remove them and start anew."
        )


def _refuse_strangers(folder: Path, config: str | None) -> None:
    """Refuse to replace files that have the names of a run's, where no run was.

    Args:
        folder: to write in.
        config: of `config_text`.

    Raises:
        UsageError: there is one.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; give a folder as --run_dir.")
    left = [path for path in left_by_a_run(folder) if not path.name.startswith("tmp-")]
    if left and not is_ours(folder, config):
        raise UsageError(
            f"{folder} holds a {left[0].relative_to(folder)} that no run wrote; give another --run_dir, or move the "
            "file away."
        )


def _lock(folder: Path, held: ExitStack) -> bool:
    """Hold a folder; when `held` is closed, it is removed if nothing was put there that was not there before."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    with ExitStack() as kept:
        for place in reversed(made):
            kept.callback(_remove_if_empty, place)
        try:
            free = kept.enter_context(locked(folder / LOCK, remove=True))
        except OSError as error:
            raise _unwritable(folder, error) from error
        if free:
            held.push(kept.pop_all())
    return free


def _remove_failed_start(folder: Path) -> None:
    """Remove what loggers wrote of a start that failed before it stored its configuration; the next would refuse it."""
    if not (folder / CONFIG).exists() and not results_in(folder):
        for path in left_by_a_run(folder):
            path.unlink(missing_ok=True)
        _remove_if_empty(folder / "tensorboard")


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(unwritable(folder, error, "--run_dir"))


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _writes() -> bool:
    """Whether this process writes the results of its job."""
    return is_first_process() and os.environ.get("NODE_RANK", "0") == "0"


def _now() -> str:
    return datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def _store_of_torchrun() -> Any:
    """What the processes started by torchrun share, also over several hosts; None where torchrun has none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
