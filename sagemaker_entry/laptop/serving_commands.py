"""The commands of `launch` that serve a trained model: deploy, transform, delete-endpoint."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from sagemaker_entry.laptop.serving_options import instance_type, parser_of, resources_of
from sagemaker_entry.protocol.problem import Problem

if TYPE_CHECKING:
    from sagemaker_entry.laptop.account import Account
    from sagemaker_entry.laptop.serving_requests import Resources, TrainedModel

Ask = Callable[[str], bool]
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
UNKNOWN_PRICE = "a price that is not known here"


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


def _say(text: str) -> None:
    print(text, flush=True)


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
        image = image if has_gpu(instance_type(options)) else for_cpu(image)
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

    resources = resources_of(options)
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

    resources = resources_of(options)
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
