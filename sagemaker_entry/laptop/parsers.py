"""The options of `launch` and of its commands about jobs and the account; imports little, for a fast --help."""

from __future__ import annotations

import argparse
import math

from dino_lightning.cli.command import CommandParser, capitalized
from sagemaker_entry.laptop import serving_options
from sagemaker_entry.laptop.places import COMMAND

COMMANDS = {
    "status": "say how a job is doing and what it has cost",
    "attach": "show a job's log and progress until it ends",
    "stop": "stop a job; it saves a checkpoint first",
    "fetch": "download a job's model and unpack it",
    "resume": "start a job that continues a stopped or failed one from its last checkpoint",
}
OF_THE_ACCOUNT = {
    "list": "list the jobs of this project with state, cost, AP and F1, the newest first",
    "clean": "delete from S3 what no job needs any more; shows it and asks first",
}


def launch_parser() -> CommandParser:
    """The options of a launch; those of `fit` are not among them."""
    commands = "\n".join(f"  {COMMAND} {name} JOB{'':<{8 - len(name)}} {text}" for name, text in COMMANDS.items())
    commands += "\n\nOf the account:\n" + "\n".join(
        f"  {COMMAND} {name:<12} {text}" for name, text in OF_THE_ACCOUNT.items()
    )
    serving = "\n".join(f"  {COMMAND} {name:<15}  {text}" for name, text in serving_options.COMMANDS.items())
    parser = CommandParser(
        COMMAND,
        "Train on Amazon SageMaker: plans and says what it costs, checks, asks, uploads, starts, follows.",
        epilog="Options of fit go along, as --model.lr 0.0001 or --ema_decay=0.9997.\n\n"
        f"Of a job:\n{commands}\n\nServe its model:\n{serving}",
    )
    parser.add_argument("--config", required=True, help="a configuration, such as configs/room_detection.yaml")
    parser.add_argument("--data", help="the dataset's folder")
    parser.add_argument("--role", help="name or ARN of the role that the job takes on")
    parser.add_argument("--trial", action="store_true", help="run a few dozen steps only, and measure what a run costs")
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
    where.add_argument("--torch", help="PyTorch version of AWS's image: 2.8 (CUDA 12), 2.10 (default), 2.11 to 2.14")
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
    account.add_argument("--network-isolation", action="store_true", help="a job without a network; packages go along")
    account.add_argument(
        "--tags", action="append", default=[], metavar="KEY=VALUE,...", help="tags of the job, for cost allocation"
    )
    account.add_argument("--mlflow", metavar="ARN", help="log to this MLflow tracking server of SageMaker, too")
    where.add_argument(
        "--keep-alive", type=int, metavar="MINUTES", help="a warm pool: instances wait for a next job, and are billed"
    )
    where.add_argument(
        "--input-mode", choices=("File", "FastFile"), default="File", help="FastFile streams the dataset from S3"
    )
    parser.add_argument("--dry-run", action="store_true", help="show plan and request; upload and start nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before starting")
    parser.add_argument("--detach", action="store_true", help="do not follow the job")
    return parser


def job_parser(command: str) -> CommandParser:
    """The options of a command of `COMMANDS`."""
    parser = CommandParser(f"{COMMAND} {command}", capitalized(COMMANDS[command]) + ".")
    parser.add_argument("job", help="the name of the training job")
    _add_account_options(parser)
    if command == "fetch":
        parser.add_argument("--to", help="the folder to make; by default the name of the job")
    if command == "resume":
        parser.add_argument("--detach", action="store_true", help="do not follow the job")
    return parser


def account_parser(command: str) -> CommandParser:
    """The options of a command of `OF_THE_ACCOUNT`."""
    parser = CommandParser(f"{COMMAND} {command}", capitalized(OF_THE_ACCOUNT[command]) + ".")
    _add_account_options(parser)
    if command == "list":
        parser.add_argument("--limit", type=_positive, default=20, metavar="N", help="so many jobs at most; default 20")
        return parser
    parser.add_argument("--bucket", help="default sagemaker-REGION-ACCOUNT")
    parser.add_argument(
        "--older-than", type=_days, default=1.0, metavar="DAYS", help="keep what was written since; default 1"
    )
    parser.add_argument("--resumable", action="store_true", help="also what stopped and failed jobs need to be resumed")
    parser.add_argument("--models", action="store_true", help="also the models that jobs have left")
    parser.add_argument("--trials", action="store_true", help="also the measurements of trials that plans use")
    parser.add_argument("--dry-run", action="store_true", help="show what would be deleted, and delete nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask before deleting")
    return parser


def _days(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError("it must be 0 or more")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return value


def _add_account_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--region", help="default: as configured for AWS")
    parser.add_argument("--profile", help="a profile of the AWS configuration files")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())
