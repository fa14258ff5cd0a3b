"""The options of the commands that serve a trained model, and what is asked for by them."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from dino_lightning.cli.command import CommandParser, capitalized
from sagemaker_entry.protocol.instances import full_type_name
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:
    from sagemaker_entry.laptop.serving_requests import Resources

COMMANDS = {
    "deploy": "create an endpoint that answers requests, or with --local a server here",
    "transform": "detect in all images of a folder in S3, or with --local of a folder here",
    "delete-endpoint": "delete an endpoint, its configuration and its model; it then costs nothing",
}
DEFAULT_TYPE, DEFAULT_CPU_TYPE = "ml.g5.xlarge", "ml.c6i.xlarge"  # the second with --onnx
MEMORY = 4096  # MB of a serverless endpoint


def parser_of(command: str, prog: str) -> CommandParser:
    """The parser of a command's options."""
    parser = CommandParser(f"{prog} {command}", capitalized(COMMANDS[command]) + ".")
    if command == "delete-endpoint":
        parser.add_argument("endpoint", help="the name of the endpoint")
    else:
        parser.add_argument("job", help="the name of the training job; with --local the folder of its model")
    if command == "transform":
        parser.add_argument("images", help="the folder in S3, such as s3://bucket/images/; with --local one here")
        parser.add_argument("--output", help="where the answers go; by default beside the model in S3")
    if command == "deploy":
        parser.add_argument("--endpoint", help="the name of the endpoint; by default that of the job")
        parser.add_argument("--serverless", action="store_true", help="on demand, on a CPU; needs --image")
        parser.add_argument("--memory", type=int, default=MEMORY, help="MB of --serverless; default %(default)s")
        parser.add_argument("--autoscale", metavar="MIN-MAX", help="number of instances that follows the requests")
        parser.add_argument("--port", type=int, default=8080, help="of --local; default %(default)s")
    if command != "delete-endpoint":
        parser.add_argument("--local", action="store_true", help="the same server on this machine, without AWS")
        parser.add_argument("--instance-type", help=f"default {DEFAULT_TYPE}; with --onnx {DEFAULT_CPU_TYPE}")
        parser.add_argument(
            "--onnx",
            action="store_true",
            help="compute with ONNX Runtime, on CPUs; exported here if the model has none",
        )
        parser.add_argument("--instances", type=int, default=1, help="how many; default %(default)s")
        parser.add_argument("--image", help="an image with a program `serve`; by default AWS's training image")
        parser.add_argument("--torch", help="the PyTorch of AWS's image, such as 2.10")
        parser.add_argument("--role", help="name or ARN of the role; by default that of the job")
        parser.add_argument(
            "--tags", action="append", default=[], metavar="KEY=VALUE,...", help="beside the tags of the job"
        )
        parser.add_argument("--detach", action="store_true", help="do not wait, unless --autoscale needs the endpoint")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--region", help="default: as configured for AWS")
    parser.add_argument("--profile", help="a profile of the AWS configuration files")
    return parser


def resources_of(options: argparse.Namespace) -> Resources:
    """What to run on.

    Raises:
        Problem: options that contradict each other or that SageMaker does not offer.
    """
    from sagemaker_entry.laptop.serving_requests import SERVERLESS_MEMORY, Resources, has_gpu

    if options.instances < 1:
        raise Problem(f"--instances is {options.instances}; it must be at least 1.")
    serverless = getattr(options, "serverless", False)
    if serverless:
        if options.instance_type or options.instances > 1 or options.autoscale:
            raise Problem("--serverless has no instances; leave out --instance-type, --instances and --autoscale.")
        if options.memory not in SERVERLESS_MEMORY:
            sizes = ", ".join(map(str, SERVERLESS_MEMORY))
            raise Problem(f"--memory is {options.memory}; serverless endpoints have {sizes} MB.")
        if options.image is None:
            raise Problem(
                "--serverless needs --image: it takes images of 10 GB at most, and AWS's training images are larger; "
                "docs/sagemaker.md shows how to build one."
            )
    elif getattr(options, "memory", MEMORY) != MEMORY:
        raise Problem("--memory is that of --serverless; an instance has what its type has.")
    scaling = None
    if getattr(options, "autoscale", None):
        found = re.fullmatch(r"(\d{1,3})-(\d{1,3})", options.autoscale)
        scaling = (int(found[1]), int(found[2])) if found else (0, -1)
        if found is None or scaling[1] < max(1, scaling[0]):
            raise Problem(f"--autoscale is {options.autoscale!r}; it looks like 1-4.")
        if scaling[0] == 0:
            raise Problem(
                "--autoscale from 0 is offered for inference components only, which this command does not make; "
                "--serverless costs nothing while nobody asks."
            )
        if not scaling[0] <= options.instances <= scaling[1]:
            raise Problem(f"--instances {options.instances} is not within --autoscale {options.autoscale}.")
    name = instance_type(options)
    if options.onnx and has_gpu(name):
        raise Problem(
            f"--onnx is for CPUs, and {name} has a GPU, where the checkpoint runs; choose a type without one, such as "
            f"{DEFAULT_CPU_TYPE}, or leave out --onnx."
        )
    return Resources(
        instance_type=name,
        count=options.instances,
        serverless_memory=options.memory if serverless else None,
        autoscale=scaling,
    )


def instance_type(options: argparse.Namespace) -> str:
    """The instance type that is asked for, or the default, by its full name."""
    return full_type_name(options.instance_type or (DEFAULT_CPU_TYPE if options.onnx else DEFAULT_TYPE))
