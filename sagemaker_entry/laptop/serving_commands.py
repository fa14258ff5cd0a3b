"""The commands of `launch` that serve a trained model: deploy, transform, delete-endpoint."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from dino_lightning.cli.command import CommandParser
from sagemaker_entry.protocol.instances import full_type_name
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:
    from sagemaker_entry.laptop.account import Account
    from sagemaker_entry.laptop.serving_requests import Resources, TrainedModel

COMMANDS = {
    "deploy": "create an endpoint that answers requests, or with --local a server here",
    "transform": "detect in all images of a folder in S3, or with --local of a folder here",
    "delete-endpoint": "delete an endpoint, its configuration and its model; it then costs nothing",
}
Ask = Callable[[str], bool]
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
DEFAULT_TYPE, DEFAULT_CPU_TYPE = "ml.g5.xlarge", "ml.c6i.xlarge"  # the second with --onnx
UNKNOWN_PRICE = "a price that is not known here"
MEMORY = 4096  # MB of a serverless endpoint


def run(args: Sequence[str], *, prog: str, agreed: Ask) -> int:
    """Run one of the commands; returns the exit code.

    Args:
        args: the command and its options.
        prog: how `launch` is called, for the help.
        agreed: asks the user a question.
    """
    command = args[0]
    parser = parser_of(command, prog)
    options = parser.parse_args(args[1:])
    if command != "delete-endpoint" and options.local:
        from sagemaker_entry.laptop.local_run import without_effect
        from sagemaker_entry.laptop.serving_local import model_folder, serve_locally, transform_locally

        ignored = without_effect(parser, options, ("local", "port", "output", "onnx", "dry_run", "yes"))
        if ignored is not None:
            _say(f"{ignored}\n")
        if options.dry_run:
            _say(f"Dry run: nothing was started. The model is {model_folder(options.job)}.")
            return 0
        if options.onnx:
            from sagemaker_entry.laptop.serving_onnx import export_here

            export_here(model_folder(options.job), _say)
        if command == "deploy":
            return serve_locally(options.job, options.port)
        return transform_locally(options.job, options.images, options.output or f"{options.images.rstrip('/')}-found")
    from sagemaker_entry.laptop.account import Account
    from sagemaker_entry.laptop.tags import user_tags

    user_tags(getattr(options, "tags", []))  # refuses wrong ones before AWS is asked
    account = Account(options.region, options.profile)
    _ = account.id
    action = {"deploy": _deploy, "transform": _transform, "delete-endpoint": _delete}[command]
    return action(options, account, agreed)


def parser_of(command: str, prog: str) -> CommandParser:
    """The parser of a command's options."""
    parser = CommandParser(f"{prog} {command}", COMMANDS[command].capitalize() + ".")
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


def _say(text: str) -> None:
    print(text, flush=True)


def _resources(options: argparse.Namespace) -> Resources:
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
    name = _instance_type(options)
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


def _instance_type(options: argparse.Namespace) -> str:
    return full_type_name(options.instance_type or (DEFAULT_CPU_TYPE if options.onnx else DEFAULT_TYPE))


def _image_and_role(options: argparse.Namespace, account: Account, model: TrainedModel) -> tuple[str, str]:
    """The image, and the ARN of the role.

    Raises:
        Problem: one that SageMaker would refuse.
    """
    from sagemaker_entry.laptop.images import check_address, image_address, look_up
    from sagemaker_entry.laptop.preflight import resolve_role
    from sagemaker_entry.laptop.serving_requests import for_cpu, has_gpu, is_awss

    if options.image is not None:
        if options.torch is not None:
            raise Problem("--torch chooses among AWS's images, and --image names one; give only one of them.")
        check_address(options.image, account.region)
        _say(f"Image: {options.image}, {look_up(account, options.image)}")
    image = options.image or image_address(account.region, options.torch)
    if is_awss(image):
        image = image if has_gpu(_instance_type(options)) else for_cpu(image)
        _say(
            f"Image: {image}\n  AWS's training image. It has no server: its bash learns `serve` from code/serve.sh of "
            "the model, by BASH_ENV, and installs the packages of the server from PyPI at each start. This was not "
            "tried on AWS; models of jobs that ran before the server was written have no such file. --image takes an "
            "image of your own instead, see docs/sagemaker.md."
        )
    role = model.role if options.role is None else resolve_role(account, options.role)[0]
    return image, role


def _names(base: str) -> str:
    """A name for a model, a configuration or a transform that no other has."""
    return f"{base[:48].rstrip('-')}-{datetime.now(timezone.utc):%Y%m%d%H%M%S}"


def _deploy(options: argparse.Namespace, account: Account, agreed: Ask) -> int:
    from sagemaker_entry.laptop import serving, serving_requests
    from sagemaker_entry.laptop.places import COMMAND
    from sagemaker_entry.laptop.serving_onnx import planned_with_onnx, upload_with_onnx

    resources = _resources(options)
    endpoint = options.endpoint or options.job[: serving.LONGEST_NAME].rstrip("-")
    if not NAME.fullmatch(endpoint):
        raise Problem(f"--endpoint {endpoint!r} is no name: letters, digits and hyphens, 63 at most.")
    model = serving.trained_model(account, options.job, options.tags)
    image, role = _image_and_role(options, account, model)
    planned = planned_with_onnx(model, _say, own_image=options.image is not None) if options.onnx else model
    name = _names(endpoint)
    requests: dict[str, dict[str, Any]] = {
        "model": serving_requests.model_request(name, planned, image, role),
        "endpoint_config": serving_requests.endpoint_config_request(name, model, name, resources),
        "endpoint": serving_requests.endpoint_request(endpoint, model, name),
    }
    if resources.serverless_memory is not None:
        per_second = serving.DOLLARS_PER_GB_SECOND * resources.serverless_memory / 1024
        cost = f"about ${per_second:.6f} for each second of computing, nothing while idle"
        source = f"in us-east-1, not looked up: see {serving.PRICE_PAGE}"
        _say(f"Serverless, {resources.serverless_memory} MB, CPU: {cost} ({source}).")
    else:
        hourly, source = serving.hourly_price(account, resources, "Host")
        cost = UNKNOWN_PRICE if hourly is None else f"${hourly:.2f} an hour until it is deleted"
        _say(f"{resources.count} x {resources.instance_type}: {cost} ({source}).")
        if resources.autoscale:
            least, most = resources.autoscale
            if hourly is not None:
                each = hourly / resources.count
                cost = f"${each * least:.2f} to ${each * most:.2f} an hour until it is deleted"
            _say(
                f"Scaled between {least} and {most} instances, at {serving.REQUESTS_PER_MINUTE} requests a minute for "
                f"each: {cost}."
            )
        _say(_quota(account, resources, "endpoint"))
    if options.dry_run:
        return _shown(requests)
    if not options.yes and not agreed(f"Create the endpoint {endpoint}, for {cost}?"):
        _say("Nothing was created.")
        return 1
    if options.onnx:
        requests["model"] = serving_requests.model_request(name, upload_with_onnx(account, model, _say), image, role)
    serving.create_endpoint(account, requests)
    _say(f"Creating {endpoint}; this takes some ten minutes.")
    if options.detach and not resources.autoscale:
        return 0
    try:
        found = serving.wait_for(
            lambda: serving.look_at_endpoint(account, endpoint), "EndpointStatus", ("Creating",), say=_say
        )
    except KeyboardInterrupt:
        _say(f"\nThe endpoint is made all the same and costs money. Delete it: {COMMAND} delete-endpoint {endpoint}")
        raise
    if found["EndpointStatus"] != "InService":
        raise Problem(
            f"The endpoint is {found['EndpointStatus']}: {found.get('FailureReason', 'AWS gives no reason')} The log "
            f"is /aws/sagemaker/Endpoints/{endpoint} in CloudWatch. Delete it: {COMMAND} delete-endpoint "
            f"{endpoint}"
        )
    if resources.autoscale:
        serving.scale(account, endpoint, *resources.autoscale)
    _say(f"\n{endpoint} answers:\n\n{serving.example(endpoint, account.region)}")
    return 0


def _transform(options: argparse.Namespace, account: Account, agreed: Ask) -> int:
    from sagemaker_entry.laptop import serving, serving_requests
    from sagemaker_entry.laptop.serving_onnx import planned_with_onnx, upload_with_onnx

    resources = _resources(options)
    model = serving.trained_model(account, options.job, options.tags)
    count = serving.count_images(account, options.images)
    image, role = _image_and_role(options, account, model)
    planned = planned_with_onnx(model, _say, own_image=options.image is not None) if options.onnx else model
    name = _names(options.job)
    output = options.output or f"{model.output}/transform/{name}/"
    if not output.startswith("s3://"):
        raise Problem(f"--output {output!r} is no address in S3; it looks like s3://bucket/found/.")
    elsewhere = serving.other_buckets(model, role, options.images, output)
    if elsewhere is not None:
        _say(elsewhere)
    requests: dict[str, dict[str, Any]] = {
        "model": serving_requests.model_request(name, planned, image, role, batch=True),
        "transform": serving_requests.transform_request(name, name, model, options.images, output, resources),
    }
    hourly, source = serving.hourly_price(account, resources, "Tsform")
    cost = UNKNOWN_PRICE if hourly is None else f"${hourly:.2f} an hour"
    _say(
        f"{count:,} files on {resources.count} x {resources.instance_type}: {cost} while it runs, minutes of starting "
        f"included ({source}).\n{_quota(account, resources, 'transform job')}\nAnswers: {output}NAME.out"
    )
    if options.dry_run:
        return _shown(requests)
    if not options.yes and not agreed(f"Start, for {cost}?"):
        _say("Nothing was started.")
        return 1
    if options.onnx:
        requests["model"] = serving_requests.model_request(
            name, upload_with_onnx(account, model, _say), image, role, batch=True
        )
    serving.create_transform(account, requests["model"], requests["transform"])
    _say(f"Started {name}.")
    stop = f"aws sagemaker stop-transform-job --transform-job-name {name}"
    if options.detach:
        _say(f"Stop it: {stop}")
        return 0
    try:
        found = serving.wait_for(
            lambda: serving.look_at_transform(account, name), "TransformJobStatus", ("InProgress", "Stopping"), say=_say
        )
    except KeyboardInterrupt:
        _say(f"\nThe transform keeps running and costs money. Stop it: {stop}")
        raise
    serving.delete_model(account, name)
    if found["TransformJobStatus"] != "Completed":
        raise Problem(
            f"{name} is {found['TransformJobStatus']}: {found.get('FailureReason', 'AWS gives no reason')} The log is "
            "/aws/sagemaker/TransformJobs in CloudWatch; answers up to there are kept."
        )
    _say(f"The answers are in {output}; an image that could not be read has its error there.")
    return 0


def _delete(options: argparse.Namespace, account: Account, agreed: Ask) -> int:
    from sagemaker_entry.laptop import serving

    config, models = serving.parts_of_endpoint(account, options.endpoint)
    _say(f"Endpoint {options.endpoint}, configuration {config}, model {', '.join(models)}; model.tar.gz in S3 stays.")
    if options.dry_run:
        return 0
    if not options.yes and not agreed("Delete them?"):
        _say("Nothing was deleted.")
        return 1
    serving.delete_endpoint(account, options.endpoint, config, models)
    _say("Deleted; it costs nothing from now on.")
    return 0


def _quota(account: Account, resources: Resources, use: str) -> str:
    from sagemaker_entry.laptop.quota import check_quota

    count = resources.autoscale[1] if resources.autoscale else resources.count
    quotas = account.client("service-quotas")
    found = check_quota(quotas, resources.instance_type, count, spot=False, region=account.region, use=use)
    return f"Quota: {found}"


def _shown(requests: dict[str, dict[str, Any]]) -> int:
    _say(f"Dry run: nothing was created. The requests would be:\n{json.dumps(requests, indent=2)}")
    return 0
