"""The container's entry point, run once on each host: from SageMaker's folders to a trained model.

    python -m sagemaker_entry.train [options of fit]

It reads the job's settings, unpacks the data, starts torchrun with one process for each GPU, forwards SIGTERM to these
processes through a flag file, watches the other hosts, and writes either the model or a failure file of one sentence.
Until `install` has run, only the standard library and torch may be imported.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dino_lightning.console import wrapped
from dino_lightning.files import remove_unfinished
from sagemaker_entry.container.channels import data_options, read_job
from sagemaker_entry.container.environment import Environment, child_environment, failure_file, read_environment
from sagemaker_entry.container.failure import Failure, first_cause, read_records, write_failure_file
from sagemaker_entry.container.install import install, require_torch
from sagemaker_entry.container.stopping import StopRequested, StopSignal, kill, run_child
from sagemaker_entry.container.worker_settings import BEST, LAST, WorkerSettings
from sagemaker_entry.protocol.instances import INSTANCES
from sagemaker_entry.protocol.job import PACKAGES_CHANNEL, Job
from sagemaker_entry.protocol.problem import Problem
from sagemaker_entry.protocol.progress import PREFIX
from sagemaker_entry.protocol.trial import TRIAL_FILE

STARTED = time.monotonic()
STOPPED = 143  # exit code of a process terminated by SIGTERM
SECONDS_TO_SAVE = 100.0  # SageMaker sends SIGKILL 120 seconds after SIGTERM
MASTER_PORT = 7777
SECONDS_TO_MEET = 900.0  # for all training processes to start and find each other


@dataclass(frozen=True)
class Outcome:
    """How the training processes of this host ended; `failure` is None after success and after a stop."""

    stopped: bool = False
    failure: Failure | None = None


def say(text: str) -> None:
    """Print a line to the job's log."""
    print(f"{PREFIX} {text}", flush=True)


def main(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Run the job on this host; returns the exit code: 0, 1 after a failure, 143 after a stop."""
    if {"-h", "--help"} & set(arguments):
        print(wrapped(str(__doc__), shutil.get_terminal_size().columns))
        return 0
    stop = StopSignal(say)
    failure_path = failure_file(environ)
    failure_path.unlink(missing_ok=True)
    if os.getpid() != 1 and failure_path.is_relative_to("/opt/ml"):
        say("not the container's first process: SIGTERM may not arrive here, so a stop may lose the running epoch")
    host = "this host"
    try:
        environment = read_environment(environ)
        host = environment.current_host
        with tempfile.TemporaryDirectory(prefix="dino_lightning-") as scratch:
            options = list(arguments)
            if options[:1] == ["train"]:  # what SageMaker starts an image with that has an entry point of its own
                del options[0]
            return _run(environment, options, environ, stop, Path(scratch), failure_path)
    except StopRequested:
        say("stopped before training began")
        return STOPPED
    except Exception as error:
        return _fail(_failure_of(error, host), failure_path)


def _failure_of(error: Exception, host: str) -> Failure:
    """The failure that reports an error of this process; the traceback of an unexpected one goes to the log."""
    if isinstance(error, Problem):
        return Failure(str(error), host=host)
    traceback.print_exception(error)
    return Failure.of(f"{type(error).__name__}: {error}", host=host)


def _fail(failure: Failure, path: Path) -> int:
    """Write and print the failure; returns the exit code."""
    write_failure_file(failure, path)
    print(f"error: {failure.sentence}", file=sys.stderr, flush=True)
    return 1


def _run(
    environment: Environment,
    arguments: list[str],
    environ: Mapping[str, str],
    stop: StopSignal,
    scratch: Path,
    failure_path: Path,
) -> int:
    if environ.get("TORCHELASTIC_RUN_ID") and environ.get("LOCAL_RANK"):
        raise Problem(
            "sagemaker_entry.train starts torchrun itself; submit the job without a `distribution` of its own."
        )
    require_torch()
    from sagemaker_entry.container.peers import Peers  # needs torch

    peers = Peers(environment.hosts, environment.rank)
    peers.start()
    outcome = Outcome()
    try:
        say(
            f"host {environment.current_host} ({environment.rank + 1} of {len(environment.hosts)}), "
            f"{environment.instance_type or 'unknown instance type'}, job {environment.job_name}"
        )
        wheels = environment.channels.get(PACKAGES_CHANNEL)
        install(Path.cwd(), run=lambda command: run_child(command, stop), wheels=wheels)
        job = read_job(environment, arguments)
        processes = _processes(environment, job, environ)
        stop.check()
        data = data_options(environment, scratch)
        stop.check()
        outcome = _train(environment, job, data, processes, environ, stop, scratch, peers)
        if outcome.failure is None and environment.leads and not job.trial:
            written = _write_model(environment, stop, complete=not outcome.stopped)
            outcome = outcome if written else Outcome(stopped=True)
    except StopRequested:
        raise
    except Exception as error:
        outcome = Outcome(failure=_failure_of(error, environment.current_host))
    finally:
        peers.leave(outcome.failure)
    if outcome.failure is not None:
        return _fail(outcome.failure, failure_path)
    return STOPPED if outcome.stopped else 0


def _processes(environment: Environment, job: Job, environ: Mapping[str, str]) -> int:
    """The number of training processes on this host: one for each GPU; on a CPU one, or `DINO_CPU_PROCESSES`.

    Raises:
        Problem: fewer GPUs, or another number of hosts, than planned.
    """
    import torch

    found = torch.cuda.device_count()
    known = INSTANCES.get(environment.instance_type)
    planned = job.gpus_per_host if job.gpus_per_host is not None else known.gpus if known else found
    if job.hosts is not None and len(environment.hosts) != job.hosts:
        raise Problem(f"The plan was for {job.hosts} hosts, but the job runs on {len(environment.hosts)}.")
    if found < planned:
        raise Problem(
            f"{planned} GPUs were planned on {environment.instance_type or 'this host'}, but PyTorch sees {found}: the "
            "driver may be too old for the image's CUDA; choose another --image or instance type."
        )
    say(f"{found} GPUs on each of {len(environment.hosts)} hosts" if found else "no GPU: training on the CPU")
    if not found:
        return int(_positive(environ, "DINO_CPU_PROCESSES", 1))
    return planned if job.gpus_per_host else found


def _train(
    environment: Environment,
    job: Job,
    data: list[str],
    processes: int,
    environ: Mapping[str, str],
    stop: StopSignal,
    scratch: Path,
    peers: Any,
) -> Outcome:
    patience = _positive(environ, "DINO_SECONDS_TO_MEET", SECONDS_TO_MEET)
    resume = (environment.checkpoint_dir / LAST).is_file() and not job.trial
    if resume:
        say(f"resuming from the checkpoint in {environment.checkpoint_dir}")
    settings = WorkerSettings(
        arguments=(*job.arguments, *data),
        config=job.config,
        run_dir=str(scratch / "trial" if job.trial else environment.checkpoint_dir),
        scratch=str(scratch),
        host=environment.current_host,
        processes=processes,
        hosts=len(environment.hosts),
        resume=resume,
        trial=str(environment.checkpoint_dir / TRIAL_FILE) if job.trial else None,
        job=environment.job_name,
        started=STARTED,
    )
    settings_file = scratch / "settings.json"
    settings_file.write_text(settings.to_json())
    command = [sys.executable, "-m", "sagemaker_entry.container.torchrun", environment.current_host, str(scratch)]
    command += _rendezvous(environment, processes)
    command += ["--max_restarts=0", "-m", "sagemaker_entry.container.worker", str(settings_file)]
    # In its own session, so that Ctrl-C in a terminal reaches this process alone.
    child = subprocess.Popen(
        command, env=child_environment(environ, environment, settings.run_dir), start_new_session=True
    )
    started = time.monotonic()
    remote: Failure | None = None
    while child.poll() is None:
        time.sleep(0.2)
        if stop.at is not None:
            settings.flag.touch()
            if stop.at_once:
                kill(child)
                _remove_unfinished(environment.checkpoint_dir)
                say("stopped at once; the last checkpoint that was saved is kept")
                return Outcome(stopped=True)
            if time.monotonic() - stop.at > SECONDS_TO_SAVE:
                kill(child)
                _remove_unfinished(environment.checkpoint_dir)
                say(f"no checkpoint was saved within {SECONDS_TO_SAVE:.0f} seconds; the previous one is kept")
                return Outcome(stopped=True)
        remote = peers.remote_failure()
        if remote is not None:
            say("another host failed; stopping this one")
            kill(child)
        elif not settings.met.exists() and time.monotonic() - started > patience:
            kill(child)
            return Outcome(failure=_never_met(environment, processes, patience))
    if settings.saved.exists():
        say(f"checkpoint of step {settings.saved.read_text()} saved; stopped on request")
        return Outcome(stopped=True)
    if child.returncode == 0:
        return Outcome()
    failures = read_records(scratch)
    if not failures and remote is None:
        failures.append(Failure(f"torchrun ended with code {child.returncode}.", host=environment.current_host))
    if remote is None and all(failure.secondary for failure in failures):
        remote = peers.wait_for_remote_failure()  # the cause lies on another host, which may yet report it
    cause = first_cause([*failures, *([remote] if remote else [])])
    return Outcome(failure=cause)


def _remove_unfinished(run_dir: Path) -> None:
    """Remove what the training processes were writing when they were killed."""
    for folder in (run_dir, run_dir / "checkpoints"):
        for suffix in (".ckpt", ".csv", ".json", ".png", ".yaml"):
            remove_unfinished(folder, suffix)


def _positive(environ: Mapping[str, str], name: str, default: float) -> float:
    """The number in an environment variable.

    Raises:
        Problem: it is no number of at least 1.
    """
    text = environ.get(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise Problem(f"{name} is {text!r}; it must be a number of at least 1.")
    return value


def _never_met(environment: Environment, processes: int, seconds: float) -> Failure:
    hosts = len(environment.hosts)
    on = f"{hosts} hosts with {processes} processes each" if hosts > 1 else f"{processes} processes on one host"
    advice = " In a VPC, the security group must allow all traffic between its own members." if hosts > 1 else ""
    return Failure(
        f"Training did not begin within {seconds:.0f} seconds: {on} read the data and wait for each other.{advice} "
        "If reading the dataset takes that long, set DINO_SECONDS_TO_MEET in the job's environment.",
        host=environment.current_host,
    )


def _rendezvous(environment: Environment, processes: int) -> list[str]:
    """Options of torchrun for where the processes meet.

    On one host at the loopback address: `--standalone` would take the host's own name, which on SageMaker is "aws" and
    does not resolve where our entry point replaces the image's own, and then waits for ever.
    """
    if len(environment.hosts) == 1:
        return [
            "--nnodes=1",
            "--node_rank=0",
            f"--nproc_per_node={processes}",
            "--master_addr=127.0.0.1",
            f"--master_port={_free_port()}",
        ]
    return [
        f"--nnodes={len(environment.hosts)}",
        f"--node_rank={environment.rank}",
        f"--nproc_per_node={processes}",
        f"--master_addr={environment.hosts[0]}",
        f"--master_port={MASTER_PORT}",
    ]


def _free_port() -> int:
    """A port of the loopback address that nothing listens on: several jobs may run on a laptop at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _write_model(environment: Environment, stop: StopSignal, *, complete: bool) -> bool:
    """Write the model and say so; returns False, and leaves no part of it, if a second Ctrl-C came before the end."""
    try:
        with stop.raised():
            written = not stop.at_once and write_model(
                environment.checkpoint_dir, environment.model_dir, complete=complete
            )
    except BaseException:  # PyTorch's writer turns the exception into its own
        if not stop.at_once:
            raise
        written = False
    if stop.at_once and not written:
        say("stopped at once: no model was written; the checkpoints are kept")
        return False
    say(f"model written to {environment.model_dir}" if written else "there is no best checkpoint yet: no model written")
    return True


def write_model(run_dir: Path, model_dir: Path, *, complete: bool) -> bool:
    """Write the best checkpoint's weights, a description, the run's results and the code that loads them.

    Args:
        run_dir: the folder of the run.
        model_dir: SageMaker packs it as model.tar.gz; see `write_model_directory`.
        complete: False if the run was stopped before its end.

    Returns:
        Whether a model was written; False if there is no best checkpoint yet.
    """
    best = run_dir / BEST
    if not best.is_file():
        return False
    from dino_lightning.export.model_directory import (
        write_model_directory,  # needs the packages that `install` installs
    )
    from dino_lightning.export.package_code import serving_code

    write_model_directory(best, run_dir, model_dir, serving_code(), complete=complete)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
