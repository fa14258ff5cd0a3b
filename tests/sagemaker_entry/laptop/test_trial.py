"""A trial: the hours that follow from its measurements, where they lie, and the request of its job."""

import dataclasses
import json

import boto3
import botocore.session
import pytest
from botocore.validate import ParamValidator

from sagemaker_entry import launch
from sagemaker_entry.laptop.compute import choose_compute
from sagemaker_entry.laptop.estimate import Work
from sagemaker_entry.laptop.length import Length
from sagemaker_entry.laptop.training_config import check_training
from sagemaker_entry.laptop.trial import measured_hours, trial_key
from sagemaker_entry.protocol.trial import Measured, read_measured

MEASURED = Measured(
    job="dino-trial-rooms-2gpu-1",
    date="2026-11-29",
    device="NVIDIA A10G",
    processes=2,
    batch_size=2,
    batches_per_step=1,
    seconds_per_batch=0.4,
    batches=30,
    waiting=0.1,
    memory_used=12_000_000_000,
    memory_total=24_000_000_000,
    seconds_per_val_image=0.05,
    seconds_after_evaluation=6.0,
    val_images=50,
    seconds_to_start=60.0,
)
WORK = Work(1000, 100, Length(50), 2, 0.35, 46_000_000)


def test_the_hours_by_hand():
    """12,500 batches of 0.4 s; 50 evaluations of 50 x 0.05 + 6 s; 180 s around the container and 60 s in it."""
    best, likely, worst = measured_hours(WORK, 2, MEASURED)
    assert likely == pytest.approx((240 + 5000 + 425) / 3600)
    assert best == pytest.approx((240 + 0.9 * 5425) / 3600)
    assert worst == pytest.approx((240 + 1.25 * 5425) / 3600)


def test_a_smaller_batch_that_auto_batch_size_found_takes_more_of_them():
    work = dataclasses.replace(WORK, length=Length(50, auto_batch_size=8, limit_val_batches=0))
    likely = measured_hours(work, 2, dataclasses.replace(MEASURED, batches_per_step=2))[1]
    assert likely == pytest.approx((240 + 50 * 125 * 2 * 0.4) / 3600)


def test_measurements_are_read_as_they_were_written_and_others_are_not():
    assert read_measured(MEASURED.to_json()) == MEASURED
    assert any("0.400 seconds a step of 4 images (10.0 images/s)" in line for line in MEASURED.lines())
    content = json.loads(MEASURED.to_json())
    for wrong in ("{", "[]", "null", *(json.dumps({**content, **bad}) for bad in (
        {"seconds_per_batch": 0}, {"waiting": "much"}, {"more": 1}, {"memory_total": float("nan")},
    ))):  # fmt: skip
        assert read_measured(wrong) is None


@pytest.mark.slow
def test_the_name_of_measurements_changes_with_what_changes_the_speed(no_account, rooms, tiny_config):
    compute = choose_compute(gpus=2, instance_type=None, count=None, wanted=1)

    def key(*options, compute=compute, image="image:1"):
        return trial_key(check_training(str(tiny_config), str(rooms), options), compute, image)

    plain = key()
    assert key("--model.lr=0.5", "--trainer.max_epochs=9", "--seed_everything=1", "--data.val_fraction=0.3") == plain
    for other in (
        key("--data.batch_size=1"),
        key("--model.num_queries=30"),
        key("--compress_gradients=true"),
        key("--trainer.precision=32-true"),
        key(compute=dataclasses.replace(compute, count=1)),
        key(image="image:2"),
    ):
        assert other != plain


@pytest.mark.slow
def test_the_job_of_a_trial_and_the_plan_after_it(aws, rooms, tiny_config, capsys):
    args = [
        "--config",
        str(tiny_config),
        "--data",
        str(rooms),
        "--dry-run",
        "--instance-count",
        "2",
        "--role",
        "trainer",
    ]
    assert launch.main([*args, "--trial", "--ema_decay=0.9"]) == 0
    out = capsys.readouterr().out
    assert "this trial" in out and "at most 20 minutes, then it is stopped: $1.01 on demand" in out
    request = json.loads(out[out.index("{\n") :])
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 1200}
    checkpoints = request["CheckpointConfig"]["S3Uri"]
    assert "/dino-lightning/trials/" in checkpoints and "/runs/" not in json.dumps(request)
    shape = (
        botocore.session.get_session().get_service_model("sagemaker").operation_model("CreateTrainingJob").input_shape
    )
    assert not ParamValidator().validate(request, shape).has_errors()

    # what the container writes there is found by the next plan, of the same training alone
    bucket, key = "sagemaker-us-east-1-123456789012", checkpoints.split("/", 3)[3].replace("<run>", "run-1")
    boto3.client("s3").create_bucket(Bucket=bucket)
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{key}trial.json", Body=MEASURED.to_json().encode())
    assert launch.main([*args, "--ema_decay=0.99"]) == 0
    out = " ".join(capsys.readouterr().out.split())  # its lines are wrapped
    assert "measured by trial dino-trial-rooms-2gpu-1 of 2026-11-29" in out and "ESTIMATE" not in out
    assert launch.main([*args, "--data.batch_size=1"]) == 0
    assert "ESTIMATE" in capsys.readouterr().out
