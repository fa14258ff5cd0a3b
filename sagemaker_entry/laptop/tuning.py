"""A hyperparameter-tuning job of SageMaker, made of a training job that `launch` has started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sagemaker_entry.laptop.submit import DRIVERS_CHANNEL, metric_definitions

OBJECTIVE = "val:F1"
CODE_CHANNELS = ("code", DRIVERS_CHANNEL)  # of the SDK's start script; an image of one's own has the code
# What a training job of the tuner takes over from the description of a training job.
TAKEN_OVER = ("RoleArn", "OutputDataConfig", "StoppingCondition", "VpcConfig", "EnableNetworkIsolation", "Environment")


def tuning_request(
    job: Mapping[str, Any],
    *,
    name: str,
    image: str,
    ranges: Mapping[str, tuple[float, float] | Sequence[str]],
    jobs: int,
    parallel: int = 1,
) -> dict[str, Any]:
    """The request `create_hyper_parameter_tuning_job` for the data, settings and instances of a training job.

    The tuner can give its jobs no command, so the image has to start `sagemaker_entry.train` itself, as that of
    docs/own-container.md does. Its jobs are on demand and keep no checkpoints in S3.

    Args:
        job: the answer of `describe_training_job`.
        name: of the tuning job; 32 characters at most.
        image: an image in ECR that starts the training by itself.
        ranges: options of `fit`, such as "model.lr": the smallest and the largest number, searched on a logarithmic
            scale, or a list of texts to choose from.
        jobs: the number of training jobs together.
        parallel: the number of training jobs at a time.
    """
    resources = job["ResourceConfig"]
    numbers = {option: values for option, values in ranges.items() if not isinstance(values[0], str)}
    return {
        "HyperParameterTuningJobName": name,
        "HyperParameterTuningJobConfig": {
            "Strategy": "Bayesian",
            "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": OBJECTIVE},
            "ResourceLimits": {"MaxNumberOfTrainingJobs": jobs, "MaxParallelTrainingJobs": parallel},
            "ParameterRanges": {
                "ContinuousParameterRanges": [
                    {"Name": option, "MinValue": f"{low}", "MaxValue": f"{high}", "ScalingType": "Logarithmic"}
                    for option, (low, high) in numbers.items()
                ],
                "CategoricalParameterRanges": [
                    {"Name": option, "Values": list(values)}
                    for option, values in ranges.items()
                    if option not in numbers
                ],
            },
            "TrainingJobEarlyStoppingType": "Auto",
        },
        "TrainingJobDefinition": {
            **{field: job[field] for field in TAKEN_OVER if job.get(field)},
            "AlgorithmSpecification": {
                "TrainingImage": image,
                "TrainingInputMode": "File",
                "MetricDefinitions": metric_definitions(),
            },
            "InputDataConfig": [
                channel for channel in job["InputDataConfig"] if channel["ChannelName"] not in CODE_CHANNELS
            ],
            "ResourceConfig": {
                field: resources[field]
                for field in ("InstanceType", "InstanceCount", "VolumeSizeInGB", "VolumeKmsKeyId")
                if field in resources
            },
            "RetryStrategy": {"MaximumRetryAttempts": 2},
        },
        "Tags": [{"Key": "project", "Value": "dino-lightning"}],
    }
