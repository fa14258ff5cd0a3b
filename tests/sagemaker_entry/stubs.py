"""An account whose clients answer what a test tells them, for calls that the local AWS does not know."""

import boto3
from botocore.stub import Stubber

REGION = "us-east-1"


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
