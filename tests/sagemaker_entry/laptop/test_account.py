"""What may be wrong in an account: one sentence each, with the way out, before anything is uploaded."""

import json

import boto3
import pytest
from botocore.exceptions import ClientError

from sagemaker_entry.laptop.account import Account, NoAccount, explained
from sagemaker_entry.laptop.preflight import (
    check_bucket,
    known_instances,
    live_instance,
    live_price,
    make_bucket,
    resolve_role,
)
from sagemaker_entry.laptop.quota import check_quota, no_room
from sagemaker_entry.laptop.trust import trusts_sagemaker
from sagemaker_entry.protocol.instances import INSTANCES
from sagemaker_entry.protocol.problem import Problem
from tests.sagemaker_entry.conftest import TRUST

# ------------------------------------------------------------------ credentials and region


def test_nobody_is_logged_in(no_account):
    with pytest.raises(NoAccount, match="aws configure"):
        _ = Account("us-east-1").id


def test_no_region_and_a_region_that_there_is_not(no_account):
    with pytest.raises(Problem, match="--region"):
        Account()
    with pytest.raises(Problem, match=r"no region 'us-east-9'.*us-east-1"):
        Account("us-east-9")


def test_a_profile_that_there_is_not(no_account):
    with pytest.raises(Problem, match="no AWS profile 'work'"):
        Account("us-east-1", "work")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ExpiredToken", "have expired"),
        ("InvalidClientTokenId", "does not accept the credentials"),
        ("AccessDenied", r"did not let us do it.*policy in docs/sagemaker.md"),
        ("Throttling", "could not do it: Throttling"),
    ],
)
def test_what_aws_says_becomes_a_sentence(code, words):
    with pytest.raises(Problem, match=words), explained("do it"):
        raise ClientError({"Error": {"Code": code, "Message": "because"}}, "Operation")


# ------------------------------------------------------------------ role


def test_a_role_by_name_and_by_arn(aws):
    account = Account()
    arn, said = resolve_role(account, "trainer")
    assert arn == f"arn:aws:iam::{account.id}:role/trainer"
    assert resolve_role(account, arn) == (arn, said) and said == f"{arn}, SageMaker may assume it"


def test_roles_that_the_job_cannot_take_on(aws):
    account = Account()
    with pytest.raises(Problem, match=f"account {account.id} has no role 'nobody'"):
        resolve_role(account, "nobody")
    with pytest.raises(Problem, match="belongs to account 999999999999"):
        resolve_role(account, "arn:aws:iam::999999999999:role/trainer")
    with pytest.raises(Problem, match="is no ARN of a role"):
        resolve_role(account, "arn:aws:iam::123456789012:user/me")
    trust = json.dumps(TRUST).replace("sagemaker.", "ec2.")
    aws("iam").create_role(RoleName="other", AssumeRolePolicyDocument=trust)
    with pytest.raises(Problem, match="trust relationship"):
        resolve_role(account, "other")


def test_a_role_that_may_not_be_looked_at_is_left_to_sagemaker(account):
    account.stub("iam").add_client_error("get_role", "AccessDenied")
    arn = f"arn:aws:iam::{account.id}:role/x"
    found, said = resolve_role(account, arn)
    assert found == arn and "not checked (iam:GetRole" in said


SAGEMAKER = {"Service": "sagemaker.amazonaws.com"}


def statement(effect="Allow", service="sagemaker.amazonaws.com", action="sts:AssumeRole", **more):
    return {"Effect": effect, "Principal": {"Service": service}, "Action": action} | more


def without(part, **instead):
    """A statement with another element in place of its `part`."""
    return {name: value for name, value in statement().items() if name != part} | instead


@pytest.mark.parametrize(
    ("statements", "answer"),
    [
        ([statement()], (True, False)),
        (statement(service=["ec2.amazonaws.com", "sagemaker.amazonaws.com"], action=["sts:*"]), (True, False)),
        ([statement(action="*")], (True, False)),
        ([statement(Condition={"StringEquals": {"aws:SourceAccount": "1"}})], (True, True)),
        ([statement(), statement("Deny")], (False, False)),
        ([statement(), statement("Deny", Condition={"Bool": {"aws:SecureTransport": "false"}})], (True, True)),
        ([statement(), statement("Deny", "ec2.amazonaws.com")], (True, False)),
        ([statement("Deny")], (False, False)),
        ([statement(action="sts:TagSession")], (False, False)),
        ([statement(service="sagemaker.amazonaws.com.evil.org")], (False, False)),
        ([statement(Principal={"AWS": "sagemaker.amazonaws.com"})], (False, False)),
        ([statement(Principal="*")], (True, False)),
        ([without("Action", NotAction="sts:AssumeRole")], (False, False)),
        ([without("Action", NotAction="s3:*")], (True, False)),
        ([statement(), without("Principal", Effect="Deny", NotPrincipal=SAGEMAKER)], (True, False)),
        ([statement(), without("Principal", Effect="Deny", NotPrincipal={"Service": "ec2"})], (False, False)),
        (None, (False, False)),
    ],
    ids=range(17),
)
def test_the_trust_relationship_is_read_as_a_policy(statements, answer):
    assert trusts_sagemaker({"Statement": statements}) == answer


# ------------------------------------------------------------------ bucket


def test_a_bucket_is_made_private_and_encrypted(aws):
    account = Account("eu-central-1")
    assert check_bucket(account, "new-bucket") is False
    make_bucket(account, "new-bucket")
    assert check_bucket(account, "new-bucket") is True
    s3 = aws("s3")
    block = s3.get_public_access_block(Bucket="new-bucket")["PublicAccessBlockConfiguration"]
    assert all(block.values()) and len(block) == 4
    (rule,) = s3.get_bucket_encryption(Bucket="new-bucket")["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"


def test_a_bucket_of_another_region(aws):
    where = {"CreateBucketConfiguration": {"LocationConstraint": "eu-west-1"}}
    boto3.client("s3", region_name="eu-west-1").create_bucket(Bucket="far-away", **where)
    with pytest.raises(Problem, match="is in eu-west-1, the job in us-east-1"):
        check_bucket(Account(), "far-away")


def test_a_bucket_of_another_account(account):
    account.stub("s3").add_client_error("head_bucket", "403", http_status_code=403)
    with pytest.raises(Problem, match=r"'theirs' belongs to another account.*--bucket"):
        check_bucket(account, "theirs")


# ------------------------------------------------------------------ quota


def quota(account, value, name="ml.g5.2xlarge for training job usage"):
    others = [{"QuotaName": "ml.g5.xlarge for training job usage", "Value": 9.0, "QuotaCode": "L-9"}]
    mine = {"QuotaName": name, "Value": value, "QuotaCode": "L-123"}
    stub = account.stub("service-quotas")
    stub.add_response("list_service_quotas", {"Quotas": others, "NextToken": "more"}, {"ServiceCode": "sagemaker"})
    stub.add_response("list_service_quotas", {"Quotas": [mine]}, {"ServiceCode": "sagemaker", "NextToken": "more"})
    return account.client("service-quotas")


def test_a_quota_of_zero_is_found_before_the_upload(account):
    with pytest.raises(Problem) as caught:
        check_quota(quota(account, 0.0), "ml.g5.2xlarge", 2, spot=False, region="us-east-1")
    for words in ("is 0, but 2 are needed", "--quota-code L-123", "--desired-value 2", "--region us-east-1"):
        assert words in str(caught.value)


def test_a_quota_of_one_is_too_small_for_two_and_two_suffice(account):
    with pytest.raises(Problem, match="is 1, but 2"):
        check_quota(quota(account, 1.0), "ml.g5.2xlarge", 2, spot=False, region="us-east-1")
    check_quota(quota(account, 2.0), "ml.g5.2xlarge", 2, spot=False, region="us-east-1")


def test_spot_has_a_quota_of_its_own(account):
    name = "ml.g5.2xlarge for spot training job usage"
    with pytest.raises(Problem, match=name):
        check_quota(quota(account, 0.0, name), "ml.g5.2xlarge", 1, spot=True, region="us-east-1")


def default_quota(account, value, name):
    """The answers of an account that has no value of its own."""
    stub = account.stub("service-quotas")
    stub.add_response("list_service_quotas", {"Quotas": []}, {"ServiceCode": "sagemaker"})
    listed = [] if value is None else [{"QuotaName": name, "Value": value, "QuotaCode": "L-7"}]
    stub.add_response("list_aws_default_service_quotas", {"Quotas": listed}, {"ServiceCode": "sagemaker"})
    return account.client("service-quotas")


def test_a_quota_that_only_has_a_default_is_that_default(account):
    name = "ml.g5.2xlarge for training job usage"
    with pytest.raises(Problem, match=r"is 0, AWS's default, but 1 are needed.*--quota-code L-7"):
        check_quota(default_quota(account, 0.0, name), "ml.g5.2xlarge", 1, spot=False, region="us-east-1")
    said = check_quota(default_quota(account, 4.0, name), "ml.g5.2xlarge", 2, spot=False, region="us-east-1")
    assert said == f"4 of {name}, AWS's default, 2 needed"


def test_a_quota_that_cannot_be_asked_for_is_said_to_be_unchecked(account):
    account.stub("service-quotas").add_client_error("list_service_quotas", "AccessDeniedException")
    said = check_quota(account.client("service-quotas"), "ml.g5.xlarge", 1, spot=False, region="us-east-1")
    assert said.startswith("not checked (servicequotas:ListServiceQuotas") and "AccessDeniedException" in said
    said = check_quota(default_quota(account, None, ""), "ml.unknown", 1, spot=False, region="us-east-1")
    assert said.startswith("not checked: AWS lists none of the name 'ml.unknown for training job usage'")


def test_no_machines_and_no_quota_come_with_what_else_would_do():
    said = no_room("CapacityError: Unable to provision", "ml.g5.2xlarge", 2, "us-east-1", spot=False)
    assert said.startswith("AWS has no free ml.g5.2xlarge in us-east-1 now.")
    assert "--instance-type ml.g6.xlarge --instance-count 2 ($2.25 an hour)" in said and "--region us-west-2" in said
    said = no_room("AWS could not start: ResourceLimitExceeded: 0", "ml.g5.2xlarge", 2, "us-east-1", spot=True)
    assert "'ml.g5.2xlarge for spot training job usage' is used up" in said and "service-quotas" in said
    assert no_room("The GPU ran out of memory", "ml.g5.2xlarge", 2, "us-east-1", spot=False) is None


# ------------------------------------------------------------------ price, GPUs, image


def price_list(*dollars):
    terms = {
        str(index): {"priceDimensions": {"a": {"unit": "Hrs", "pricePerUnit": {"USD": str(price)}}}}
        for index, price in enumerate(dollars)
    }
    return {"PriceList": [json.dumps({"terms": {"OnDemand": terms}})]}


def test_the_live_price(account):
    by_usage = [{"Type": "TERM_MATCH", "Field": "usagetype", "Value": "USE1-Train:ml.g5.2xlarge"}]
    expected = {"ServiceCode": "AmazonSageMaker", "Filters": by_usage}
    stub = account.stub("pricing")
    stub.add_response("get_products", price_list(0, 1.6), expected)
    assert live_price(account.client("pricing"), "ml.g5.2xlarge", "us-east-1") == 1.6
    stub.add_response("get_products", price_list(1.9))
    assert live_price(account.client("pricing"), "ml.g5.2xlarge", "eu-west-1") == 1.9
    stub.add_response("get_products", {"PriceList": []})
    assert live_price(account.client("pricing"), "ml.g5.2xlarge", "eu-west-1") is None
    stub.add_client_error("get_products", "AccessDeniedException")
    assert live_price(account.client("pricing"), "ml.g5.2xlarge", "eu-west-1") is None


def test_the_live_price_goes_into_the_table(account):
    account.stub("pricing").add_response("get_products", price_list(1.75))
    table, source = known_instances(account, "ml.g5.2xlarge")
    assert table["ml.g5.2xlarge"].price == 1.75
    assert table["ml.g5.xlarge"] == INSTANCES["ml.g5.xlarge"]
    assert "read just now" in source


def test_a_type_that_the_table_lacks_is_looked_up(account):
    answer = {
        "InstanceTypes": [
            {
                "InstanceType": "p4d.24xlarge",
                "GpuInfo": {"Gpus": [{"Name": "A100", "Count": 8, "MemoryInfo": {"SizeInMiB": 40960}}]},
                "MemoryInfo": {"SizeInMiB": 1179648},
                "NetworkInfo": {"NetworkCards": [{"BaselineBandwidthInGbps": 100.0}]},
            }
        ]
    }
    account.stub("ec2").add_response("describe_instance_types", answer, {"InstanceTypes": ["p4d.24xlarge"]})
    found = live_instance(account.client("ec2"), "ml.p4d.24xlarge")
    assert (found.gpus, found.gpu, found.gpu_memory, found.network) == (8, "A100", 40, 100.0)
    account.stub("ec2").add_client_error("describe_instance_types", "InvalidInstanceType")
    assert live_instance(account.client("ec2"), "ml.p9.large") is None
