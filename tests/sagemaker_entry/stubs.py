"""An account whose clients answer what a test tells them, for calls that the local AWS does not know."""

import datetime

import boto3
from botocore.stub import Stubber

from sagemaker_entry.laptop.follow import PRICE_TAG

REGION = "us-east-1"
NOW = datetime.datetime(2026, 11, 24, 12, 0, tzinfo=datetime.timezone.utc)
JOB = "dino-rooms-2gpu-20261124110000"


class StubbedAccount:
    """Looks like `Account`; `stub(service)` gives the Stubber that decides the service's answers, in order."""

    id = "123456789012"
    region = REGION

    def __init__(self):
        self._clients, self._stubs = {}, {}

    def client(self, service, region=None):
        if service not in self._clients:
            self._clients[service] = boto3.client(
                service, region_name=REGION, aws_access_key_id="key", aws_secret_access_key="secret"
            )
            self._stubs[service] = Stubber(self._clients[service])
            self._stubs[service].activate()
        return self._clients[service]

    def stub(self, service):
        self.client(service)
        return self._stubs[service]

    def assert_all_asked(self):
        for stub in self._stubs.values():
            stub.assert_no_pending_responses()


def description(status="InProgress", secondary="Training", hosts=2, **more):
    """What SageMaker says of `JOB`."""
    return {
        "TrainingJobName": JOB,
        "TrainingJobArn": f"arn:aws:sagemaker:us-east-1:123456789012:training-job/{JOB}",
        "ModelArtifacts": {"S3ModelArtifacts": "s3://b/model.tar.gz"},
        "TrainingJobStatus": status,
        "SecondaryStatus": secondary,
        "AlgorithmSpecification": {"TrainingInputMode": "File"},
        "ResourceConfig": {"InstanceType": "ml.g5.2xlarge", "InstanceCount": hosts, "VolumeSizeInGB": 100},
        "StoppingCondition": {"MaxRuntimeInSeconds": 3600},
        "CreationTime": NOW,
        **more,
    }


def add_price(stub, price):
    """The next answer of a SageMaker stub: the tags of `JOB`, with its price."""
    tags = [{"Key": "project", "Value": "dino-lightning"}, {"Key": PRICE_TAG, "Value": price}]
    stub.add_response("list_tags", {"Tags": tags}, {"ResourceArn": description()["TrainingJobArn"]})
