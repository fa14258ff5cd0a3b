"""On the laptop: plan, check, upload once, start, follow, fetch.

python -m sagemaker_entry.launch --config configs/room_detection.yaml --data DIR --role ROLE
python -m sagemaker_entry.launch {status,attach,stop,fetch,resume,deploy,transform} JOB
python -m sagemaker_entry.launch {list,clean}
python -m sagemaker_entry.launch delete-endpoint NAME
"""

from __future__ import annotations

from dino_lightning.interrupts import ended, handle_ctrl_c

if __name__ == "__main__":
    handle_ctrl_c()  # before the imports that take time

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_lightning.cli.command import SIGNAL_EXIT_CODE, run_command
from sagemaker_entry.laptop import serving_commands, serving_options
from sagemaker_entry.laptop.parsers import (
    COMMANDS,
    OF_THE_ACCOUNT,
    account_parser,
    job_parser,
    launch_parser,
)
from sagemaker_entry.laptop.places import COMMAND, PREFIX
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:  # everything heavy is imported where it is used: --help should not take seconds
    from sagemaker_entry.laptop.account import Account
    from sagemaker_entry.laptop.launch_options import LaunchOptions
    from sagemaker_entry.laptop.training_config import Training


def main(args: Sequence[str]) -> int:
    """Run a command; returns the exit code. Bad input and refusals of AWS end in one sentence."""

    def action() -> int:
        if args and args[0] in COMMANDS:
            return _about_a_job(args[0], job_parser(args[0]).parse_args(args[1:]))
        if args and args[0] in OF_THE_ACCOUNT:
            return _about_the_account(args[0], account_parser(args[0]).parse_args(args[1:]))
        if args and args[0] in serving_options.COMMANDS:
            if "--local" not in args and not {"-h", "--help"} & set(args):
                _need("boto3")
            return serving_commands.run(args, prog=COMMAND, agreed=_agreed)
        return _launch(args)

    return run_command(action)


def _launch(args: Sequence[str]) -> int:
    parser = launch_parser()
    options, extra = parser.parse_known_args(args)
    for name in ("max_cost", "max_run_hours", "max_wait_hours"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be more than 0 and finite.")
    from sagemaker_entry.laptop.fit_options import fit_arguments

    given = fit_arguments(extra, parser.option_names())
    from sagemaker_entry.laptop.launch_options import LaunchOptions
    from sagemaker_entry.laptop.training_config import check_training

    if options.local_dir is not None and not options.local:
        parser.error("--local-dir is the folder of --local, which is missing.")
    wanted = LaunchOptions(**{field.name: getattr(options, field.name) for field in fields(LaunchOptions)})
    if options.local:
        from sagemaker_entry.laptop.local_run import without_effect

        _say_if(without_effect(parser, options, ("config", "data", "trial", "local", "local_dir", "dry_run", "yes")))
    training = check_training(options.config, options.data, given)
    print(f"{training.data.summary()}\n\n{training.data.class_table()}\n", flush=True)
    if options.local:
        return _run_locally(options, training)
    return _run_on_sagemaker(options, wanted, training)


def _say_if(text: str | None) -> None:
    if text is not None:
        print(f"{text}\n", flush=True)


def _run_locally(options: argparse.Namespace, training: Training) -> int:
    from sagemaker_entry.laptop.dataset_pack import read_dataset, write_dataset
    from sagemaker_entry.laptop.estimate import work_of
    from sagemaker_entry.laptop.local_run import prepare_opt_ml, run_locally
    from sagemaker_entry.laptop.trial import local_report, trial_arguments
    from sagemaker_entry.protocol.job import Job

    if options.dry_run:
        print("Dry run: options and dataset are right; nothing was run.")
        return 0
    root = Path(options.local_dir or tempfile.mkdtemp(prefix="opt-ml-")).resolve()
    print(f"The container's entry on this machine, without AWS, with {root} for /opt/ml\n", flush=True)
    stored = root / "dataset-as-in-s3"
    write_dataset(read_dataset(training.data), stored)
    names = {option: path.name for option, path in training.weights.items()}
    weights = {path.name: path for path in training.weights.values()}
    arguments = trial_arguments(training) if options.trial else training.arguments
    job = Job(arguments=arguments, hosts=1, trial=options.trial, weights=names)
    prepare_opt_ml(root, stored, training.config, job, weights)
    code, stopped_by = run_locally(root)
    if stopped_by is not None and code:
        print(f"\nStopped. Resume: {COMMAND} ... --local --local-dir {root}")
    elif stopped_by is not None:
        print(f"\nInterrupted after the end of the training; nothing is missing in {root}")
    if stopped_by is not None:
        return SIGNAL_EXIT_CODE + stopped_by
    if code == 0 and options.trial:
        print(f"\n{local_report(root, work_of(training))}")
    elif code == 0:
        print(f"\nThe model as a job would leave it: {root / 'model'}")
    return code


def _run_on_sagemaker(options: argparse.Namespace, wanted: LaunchOptions, training: Training) -> int:
    _need("boto3", "sagemaker")
    from sagemaker_entry.laptop.start import (
        bucket_name,
        make_plan,
        planned_job,
        run_preflight,
        start,
    )
    from sagemaker_entry.laptop.submit import as_request

    account = _account(wanted, needed=not options.dry_run)
    plan = make_plan(wanted, training, account)
    print(plan.table(), flush=True)
    if account is None or options.dry_run:
        role = wanted.role or "<role>"
        if account is not None:
            role = _tried(run_preflight, wanted, plan, account) or role
        bucket = bucket_name(wanted, account.id if account else "<account>", account.region if account else "<region>")
        place = f"s3://{bucket}/{PREFIX}"
        spec = planned_job(
            wanted,
            training,
            plan,
            role=role,
            run="<run>",
            dataset=f"{place}/datasets/<content>/",
            code=f"{place}/code/<content>/source.tar.gz",
            weights=f"{place}/weights/<content>/",
            bucket=bucket,
        )
        print(
            f"Dry run: nothing was uploaded or started. The request would be:\n{json.dumps(as_request(spec), indent=2)}"
        )
        return 0
    role, found = run_preflight(wanted, plan, account)
    _show_checks(found)
    if not options.yes and not _agreed(f"Upload and start? At most {plan.limits}."):
        print("Nothing was uploaded or started.")
        return 1
    job = start(wanted, training, plan, account, role, lambda text: print(text, flush=True))
    page = f"https://{account.region}.console.aws.amazon.com/sagemaker/home?region={account.region}#/jobs/{job}"
    print(f"\nStarted {job}\n{page}", flush=True)
    if options.detach:
        print(f"Watch it: {COMMAND} attach {job}")
        return 0
    code = _attach(account, job)
    if options.trial and code == 0:
        measured = make_plan(wanted, training, account)
        print("\n" + "\n".join(measured.result_of_trial()))
    return code


def _tried(check: Callable[..., tuple[str, dict[str, str]]], *arguments: Any) -> str | None:
    """The checks of a dry run: a launch that would be refused is said and is no failure; returns the role's ARN."""
    try:
        role, found = check(*arguments)
    except Problem as problem:
        print(f"A launch would be refused now: {problem}\n", flush=True)
        return None
    _show_checks(found)
    return role


def _show_checks(found: dict[str, str]) -> None:
    lines = [f"  {name:<8} {what}" for name, what in found.items()]
    print("\n".join(["Checked before the upload", *lines, ""]), flush=True)


def _account(wanted: LaunchOptions, *, needed: bool) -> Account | None:
    """The account; None for a dry run of somebody who has no credentials yet, or whom AWS does not answer."""
    from sagemaker_entry.laptop.account import Account, NoAccount, Unreachable

    try:
        account = Account(wanted.region, wanted.profile)
        _ = account.id
    except (NoAccount, Unreachable) as problem:
        if needed:
            raise
        print(
            f"Planned without an account: prices are from the table; role, bucket, quota and image are not looked at. "
            f"({problem})\n",
            flush=True,
        )
        return None
    return account


def _about_a_job(command: str, options: argparse.Namespace) -> int:
    _need("boto3")
    from sagemaker_entry.laptop.account import Account
    from sagemaker_entry.laptop.follow import describe, hourly_price, summary
    from sagemaker_entry.laptop.job_commands import fetch, resume, stop

    account = Account(options.region, options.profile)
    _ = account.id
    if command == "status":
        client = account.client("sagemaker")
        found = describe(client, options.job)
        print(summary(found, hourly_price(client, found)))
    elif command == "stop":
        print(stop(account.client("sagemaker"), options.job))
    elif command == "fetch":
        folder = fetch(account, options.job, Path(options.to or options.job))
        print(f"{folder}: model.ckpt (weights, classes, sizes), model.json (what it is), code/ (to serve it)")
        print(f"Use it: load_detector('{folder}/model.ckpt').detect(['plan.png']), from dino_lightning")
    elif command == "resume":
        name, most = resume(account, options.job)
        print(f"Started {name}, which continues where {options.job} stopped.\n{most}", flush=True)
        return 0 if options.detach else _attach(account, name)
    else:
        return _attach(account, options.job)
    return 0


def _about_the_account(command: str, options: argparse.Namespace) -> int:
    _need("boto3")
    from sagemaker_entry.laptop.account import Account

    account = Account(options.region, options.profile)
    _ = account.id
    if command == "clean":
        return _clean(account, options)
    from sagemaker_entry.laptop.job_list import list_jobs

    print(list_jobs(account, options.limit))
    return 0


def _clean(account: Account, options: argparse.Namespace) -> int:
    from sagemaker_entry.laptop.clean import delete, read_and_decide, table

    bucket = options.bucket or f"sagemaker-{account.region}-{account.id}"
    stored = read_and_decide(
        account,
        bucket,
        older_than=options.older_than,
        resumable=options.resumable,
        models=options.models,
        trials=options.trials,
    )
    if not stored:
        print(f"Nothing of this program lies in s3://{bucket}.")
        return 0
    print(f"s3://{bucket}\n{table(stored, datetime.now(timezone.utc))}\n", flush=True)
    unused = [each for each in stored if each.kept is None]
    size = f"{sum(each.size for each in unused) / 1e6:,.1f} MB in {sum(len(each.keys) for each in unused)} objects"
    if options.dry_run or not unused:
        print(f"Dry run: {size} would be deleted." if unused else "Nothing is to be deleted.")
        return 0
    if not options.yes and not _agreed(f"Delete {size} for good?"):
        print("Nothing was deleted.")
        return 1
    delete(account, bucket, unused)
    print(f"Deleted {size}.")
    return 0


def _attach(account: Account, job: str) -> int:
    from sagemaker_entry.laptop.follow import follow, hourly_price, summary

    ended = follow(account, job, say=lambda line: print(line, flush=True))
    print(f"\n{summary(ended, hourly_price(account.client('sagemaker'), ended))}")
    return 0 if ended["TrainingJobStatus"] == "Completed" else 1


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise Problem(f"This needs {' and '.join(missing)}: python -m pip install 'dino-lightning[sagemaker]'.")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise Problem(
            "The terminal is not interactive, so nobody can answer: give --yes to begin without a question, or "
            "--dry-run to see what would be done."
        )
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


if __name__ == "__main__":
    sys.exit(ended(main(sys.argv[1:])))
