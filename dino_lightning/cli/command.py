"""The frame of every command: one parser, one sentence for what the user can correct, the same exit codes.

Imported before anything heavy, so that `--help` and a wrong option are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from dino_lightning.console import WHOLE_WORDS, say, without_secrets, wrapped
from dino_lightning.errors import FROM_A_LOADER, UsageError, UserError
from dino_lightning.files import FULL, reason_of, unreadable, unwritable, why_unreadable
from dino_lightning.interrupts import CtrlC

PROGRAM = "python -m dino_lightning"
BAD_INPUT, WRONG_OPTION = 1, 2
SIGNAL_EXIT_CODE = 128  # plus the signal's number: how shells say that a signal ended a process
INTERRUPTED, TERMINATED = SIGNAL_EXIT_CODE + signal.SIGINT, SIGNAL_EXIT_CODE + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM arrived; raised where the program is, so that temporary files are removed on the way out."""


WIDEST = 118  # characters of a line of help


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Descriptions as wide as the terminal, 118 characters at most."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrapped(text, min(width, WIDEST))


class CommandParser(argparse.ArgumentParser):
    """A parser that raises `argparse.ArgumentError` for a wrong option, instead of printing usage and exiting.

    Options are not abbreviated: an abbreviation would change its meaning when an option is added.

    Args:
        prog: the command as it is typed.
        description: what it does, printed by `--help`, see `wrapped`.
        **more: further arguments of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, description: str, **more: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """The options as a namespace.

        Raises:
            argparse.ArgumentError: an option that does not exist, lacks its value or has a bad one.
        """
        options, unknown = self.parse_known_args(None if args is None else list(args), namespace)
        if unknown:
            self.error(no_such_option(unknown[0], self.option_names()))
        return options

    def format_help(self) -> str:
        """The help. Its usage has what must be given; all options, which follow, would be wider than a terminal."""
        self.usage = self.usage or self._short_usage()
        return super().format_help()

    def _short_usage(self) -> str:
        named = [action for action in self._actions if action.option_strings and action.required]
        placed = [action for action in self._actions if not action.option_strings]
        words = [f"{action.option_strings[-1]} {_values(action)}" for action in named]
        words += ["[options]", *(_values(action) for action in placed)]
        first = " " * len("usage: ")
        further, width = f"{first}    ", min(shutil.get_terminal_size().columns - 2, WIDEST)
        text = " ".join([self.prog, *words])
        filled = textwrap.fill(text, width, initial_indent=first, subsequent_indent=further, **WHOLE_WORDS)
        return filled.lstrip()

    def option_names(self) -> list[str]:
        """The names of all options, with their dashes."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        """Report a wrong option.

        Raises:
            argparse.ArgumentError: always; `run_command` prints its message.
        """
        raise argparse.ArgumentError(None, message)


def _values(action: argparse.Action) -> str:
    """What is given to an option or in a place, as a usage shows it."""
    name = action.dest.upper() if action.option_strings else action.dest
    if isinstance(action.metavar, str):
        name = action.metavar
    elif action.choices:
        name = "|".join(map(str, action.choices))
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} [{name} ...]"}.get(str(action.nargs), name)


def capitalized(text: str) -> str:
    """A text with a capital at its start; names within it stay as they are, unlike with `str.capitalize`."""
    return text[:1].upper() + text[1:]


def no_such_option(argument: str, names: Sequence[str]) -> str:
    """The sentence about an argument that no option takes, with the closest name or all of them."""
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return f"{argument!r} belongs to no option. Options: {', '.join(sorted(names))}."
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"There is no option {name}. Did you mean {close[0]}?"
    return f"There is no option {name}. Options: {', '.join(sorted(names))}."


def boolean(text: str) -> bool:
    """The value of an option that is true or false.

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def expected_errors() -> tuple[type[BaseException], ...]:
    """The errors that are the user's to correct, for an `except` clause."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # not imported: then it raised nothing
    more = () if lightning is None else (lightning.MisconfigurationException,)
    return (argparse.ArgumentError, UserError, *more)


def explain(error: BaseException) -> str:
    """The message of an error in one sentence, without the traceback that a loader process wraps around it."""
    message = str(error)
    if FROM_A_LOADER in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    return str(without_secrets(message))


def run_command(action: Callable[[], int], *, interrupted: Callable[[], str] = lambda: "Interrupted.") -> int:
    """Run a command; what the user can correct becomes one sentence on stderr, and every end its exit code.

    Args:
        action: does the work and returns the exit code.
        interrupted: what to say after Ctrl-C and SIGTERM where the `KeyboardInterrupt` says nothing itself; empty for
            nothing.

    Returns:
        The exit code of the action; 1 for bad input, 2 for a wrong option, 130 after Ctrl-C, 143 after SIGTERM.
    """
    with _ctrl_c_noted() as ctrl_c:
        try:
            with _terminated_by_signal():
                return action()
        except expected_errors() as error:
            print(f"error: {explain(error)}", file=sys.stderr)
            return WRONG_OPTION if isinstance(error, argparse.ArgumentError) else BAD_INPUT
        except OSError as error:
            if error.filename is None and error.errno not in FULL:
                raise
            print(without_secrets(f"error: {_what_failed(error)}"), file=sys.stderr)
            return BAD_INPUT
        except (KeyboardInterrupt, Terminated) as stop:
            _say_interrupted(str(stop) or interrupted(), ctrl_c)
            return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
        except (SystemExit, RuntimeError) as stop:
            # Lightning ends an interrupted run by exit(1), and PyTorch's writer fails at the file that it was writing.
            if isinstance(stop.__context__, (KeyboardInterrupt, Terminated)):
                _say_interrupted(str(stop.__context__) or interrupted(), ctrl_c)
                return TERMINATED if isinstance(stop.__context__, Terminated) else INTERRUPTED
            if not ctrl_c.presses:
                raise
        except Exception:
            if not ctrl_c.presses:
                raise
        # A package swallowed Ctrl-C, while it was imported for example, and failed at what it had not finished.
        _say_interrupted(interrupted(), ctrl_c)
        return INTERRUPTED


def _what_failed(error: OSError) -> str:
    """The sentence about a file that was opened for a purpose not known here."""
    name = "a file could not be written" if error.filename is None else str(error.filename)
    if error.errno in FULL:
        return f"{name}: {reason_of(error)}. Free some space, and try again."
    problem = None if error.filename is None else why_unreadable(name)
    if problem is not None:
        return f"{name} {unreadable(problem)}."
    if isinstance(error, PermissionError):
        return f"{name}: {reason_of(error)}. Change the permissions of it or of its folder, or give another."
    return f"{name}: {reason_of(error)}."


@contextmanager
def writing(path: str | Path, option: str) -> Iterator[None]:
    """Name the output that the user gave, and the option, where it cannot be written.

    An input that is read inside and cannot be is named instead: what the system's error is about is looked at again.

    Args:
        path: the file or folder; system errors about it, about what is beside or in it, or about no file, are its own.
        option: by which it was named.

    Raises:
        UsageError: it cannot be written, or an input cannot be read.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(_sentence(path, error, option)) from error


def _sentence(path: str | Path, error: OSError, option: str) -> str:
    """What to say about an error while an output is written."""
    if error.filename is None or error.errno in FULL:
        return unwritable(path, error, option)
    named, output = Path(os.fsdecode(error.filename)), Path(path).absolute()
    problem = why_unreadable(named)
    if problem is not None:
        return f"{named} {unreadable(problem)}."
    beside = output.parent in named.absolute().parents or named.absolute() in output.parents
    return unwritable(path, error, option) if beside else f"{named}: {reason_of(error)}."


def _say_interrupted(text: str, ctrl_c: CtrlC) -> None:
    ctrl_c.told = True
    if text:
        say(f"\n{text}", sys.stderr)


@contextmanager
def _terminated_by_signal() -> Iterator[None]:
    """Raise `Terminated` when SIGTERM arrives, in this process alone; its children end as they would without it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() == own:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ctrl_c_noted() -> Iterator[CtrlC]:
    """What handles Ctrl-C: the program's, if it began so (see `handle_ctrl_c`); otherwise one for the time inside."""
    before, ctrl_c = signal.getsignal(signal.SIGINT), CtrlC()
    if isinstance(before, CtrlC):
        yield before
        return
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield ctrl_c
        return
    signal.signal(signal.SIGINT, ctrl_c)
    try:
        yield ctrl_c
    finally:
        if signal.getsignal(signal.SIGINT) is ctrl_c:
            signal.signal(signal.SIGINT, before)


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings as one line, without file, line number and source text, which say nothing to a user.

    To be entered after Lightning is imported, which sets a format of its own.
    """
    before = warnings.formatwarning
    warnings.formatwarning = _one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"warning: {' '.join(str(without_secrets(str(message))).split())}\n"
