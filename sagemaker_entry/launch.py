"""On the laptop: plan, check, upload once, start, follow, fetch.

python -m sagemaker_entry.launch --config configs/room_detection.yaml --data DIR --role ROLE
python -m sagemaker_entry.launch {status,attach,stop,fetch,resume} JOB
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dino_lightning.cli.command import CommandParser, no_such_option, run_command
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:  # everything heavy is imported where it is used: --help should not take seconds
    from sagemaker_entry.laptop.account import Account
    from sagemaker_entry.laptop.launch_options import LaunchOptions
    from sagemaker_entry.laptop.training_config import Training

COMMANDS = {
    "status": "say how a job is doing and what it has cost",
    "attach": "show a job's log and progress until it ends",
    "stop": "stop a job; it saves a checkpoint first",
    "fetch": "download a job's model and unpack it",
    "resume": "start a job that continues a stopped or failed one from its last checkpoint",
}
PASSED_ON = ("--data.", "--model.", "--trainer.", "--seed_everything")
COMMAND = "python -m sagemaker_entry.launch"


def main(args: Sequence[str]) -> int:
    """Run a command; returns the exit code. Bad input and refusals of AWS end in one sentence."""

    def action() -> int:
        if args and args[0] in COMMANDS:
            return _about_a_job(args[0], _job_parser(args[0]).parse_args(args[1:]))
        return _launch(args)

    return run_command(action)


def _launch(args: Sequence[str]) -> int:
    parser = _launch_parser()
    options, extra = parser.parse_known_args(args)
    for name in ("max_cost", "max_run_hours", "max_wait_hours"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be more than 0 and finite.")
    for argument in extra:
        if not argument.startswith(PASSED_ON):
            hint = no_such_option(argument, parser.option_names())
            parser.error(f"{hint} Options of fit begin with {', '.join(PASSED_ON)}.")
        if "=" not in argument:
            parser.error(f"Write {argument}=VALUE, in one word.")
    from sagemaker_entry.laptop.launch_options import LaunchOptions
    from sagemaker_entry.laptop.training_config import check_training

    wanted = LaunchOptions(**{field.name: getattr(options, field.name) for field in fields(LaunchOptions)})
    training = check_training(options.config, options.data, extra)
    print(f"{training.data.summary()}\n\n{training.data.class_table()}\n", flush=True)
    if options.local:
        return _run_locally(options, training)
    return _run_on_sagemaker(options, wanted, training)


def _run_locally(options: argparse.Namespace, training: Training) -> int:
    from sagemaker_entry.laptop.dataset_pack import read_dataset, write_dataset
    from sagemaker_entry.laptop.local_run import prepare_opt_ml, run_locally
    from sagemaker_entry.protocol.job import Job

    root = Path(options.local_dir or tempfile.mkdtemp(prefix="opt-ml-")).resolve()
    print(f"The container's entry on this machine, without AWS, with {root} for /opt/ml\n", flush=True)
    stored = root / "dataset-as-in-s3"
    write_dataset(read_dataset(training.data), stored)
    names = {option: path.name for option, path in training.weights.items()}
    weights = {path.name: path for path in training.weights.values()}
    prepare_opt_ml(root, stored, training.config, Job(arguments=training.arguments, hosts=1, weights=names), weights)
    code = run_locally(root)
    if code == 0:
        print(f"\nThe model as a job would leave it: {root / 'model'}")
    elif code == 143:
        print(f"\nStopped. Resume: {COMMAND} ... --local --local-dir {root}")
    return code


def _run_on_sagemaker(options: argparse.Namespace, wanted: LaunchOptions, training: Training) -> int:
    _need("boto3", "sagemaker")
    from sagemaker_entry.laptop.start import (
        PREFIX,
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
    if not options.yes and not _agreed(f"Upload and start, for ${plan.limits.max_cost:,.2f} at most?"):
        print("Nothing was uploaded or started.")
        return 1
    job = start(wanted, training, plan, account, role, lambda text: print(text, flush=True))
    page = f"https://{account.region}.console.aws.amazon.com/sagemaker/home?region={account.region}#/jobs/{job}"
    print(f"\nStarted {job}\n{page}", flush=True)
    if options.detach:
        print(f"Watch it: {COMMAND} attach {job}")
        return 0
    return _attach(account, job)


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
            "The terminal is not interactive, so nobody can confirm the start: give --yes to start without a question, "
            "or --dry-run to see the plan alone."
        )
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _launch_parser() -> CommandParser:
    commands = "\n".join(f"  {COMMAND} {name} JOB{'':<{8 - len(name)}} {text}" for name, text in COMMANDS.items())
    parser = CommandParser(
        COMMAND,
        "Train on Amazon SageMaker: plans and says what it costs, checks, asks, uploads, starts, follows.",
        epilog=f"Options of fit go along, as --model.lr=0.0001 or --trainer.max_epochs=12.\n\nOf a job:\n{commands}",
    )
    parser.add_argument("--config", required=True, help="a configuration, such as configs/room_detection.yaml")
    parser.add_argument("--data", help="the dataset's folder")
    parser.add_argument("--role", help="name or ARN of the role that the job takes on")
    parser.add_argument("--local", action="store_true", help="run the container's entry here, without AWS and Docker")
    parser.add_argument("--local-dir", help="with --local: the folder for /opt/ml; give it again to resume")
    where = parser.add_argument_group("machines")
    where.add_argument("--gpus", type=int, help="all GPUs together; by default what the configuration is made for")
    where.add_argument("--instance-type", help="default ml.g5.2xlarge, which has ONE A10G")
    where.add_argument("--instance-count", type=int, help="default: as many as --gpus takes")
    where.add_argument(
        "--spot", action="store_true", help="spot instances: 30 to 60 %% of the price, with interruptions"
    )
    where.add_argument("--image", help="container image in ECR; by default AWS's PyTorch training image")
    where.add_argument(
        "--torch", help="PyTorch version of AWS's image: 2.8 (CUDA 12), 2.10 (default), 2.11, 2.12, 2.13"
    )
    money = parser.add_argument_group("limits")
    money.add_argument("--max-cost", type=float, metavar="DOLLARS", help="stop the job before it costs more, on demand")
    money.add_argument(
        "--max-run-hours", type=float, help="stop the job after so long; default: the worst estimate + 25 %%"
    )
    money.add_argument("--max-wait-hours", type=float, help="with --spot: give up after so long, waiting included")
    account = parser.add_argument_group("account")
    _add_account_options(account)
    account.add_argument("--bucket", help="default sagemaker-REGION-ACCOUNT; made if it does not exist")
    account.add_argument("--subnets", type=_names, default=(), help="of a VPC, with commas between")
    account.add_argument("--security-groups", type=_names, default=(), help="of a VPC, with commas between")
    account.add_argument("--kms-key", help="id or ARN of the KMS key that encrypts bucket and disks")
    parser.add_argument("--dry-run", action="store_true", help="show plan and request; upload and start nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before starting")
    parser.add_argument("--detach", action="store_true", help="do not follow the job")
    return parser


def _job_parser(command: str) -> CommandParser:
    parser = CommandParser(f"{COMMAND} {command}", COMMANDS[command].capitalize() + ".")
    parser.add_argument("job", help="the name of the training job")
    _add_account_options(parser)
    if command == "fetch":
        parser.add_argument("--to", help="the folder to make; by default the name of the job")
    if command == "resume":
        parser.add_argument("--detach", action="store_true", help="do not follow the job")
    return parser


def _add_account_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--region", help="default: as configured for AWS")
    parser.add_argument("--profile", help="a profile of the AWS configuration files")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
