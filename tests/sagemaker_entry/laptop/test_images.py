"""AWS's training images: the table against the SDK's lists, and images of the user's own."""

import datetime
import importlib.metadata
import importlib.resources
import importlib.util
import json

import pytest

from sagemaker_entry import launch
from sagemaker_entry.laptop.account import Account
from sagemaker_entry.laptop.images import (
    ACCOUNTS,
    IMAGES,
    TABLE_SDK,
    check_address,
    image_address,
    image_notes,
    image_python,
    look_up,
)
from sagemaker_entry.protocol.problem import Problem

OWN = "123456789012.dkr.ecr.us-east-1.amazonaws.com/mine:1"


@pytest.mark.parametrize("version", IMAGES)
def test_the_table_says_what_the_installed_sdk_says(version):
    pytest.importorskip("sagemaker.core")
    folder = importlib.resources.files("sagemaker.core") / "image_uri_config"
    image = IMAGES[version]
    if image.repository == "pytorch":
        listed = json.loads((folder / "pytorch-amzn2023.json").read_text())["training"]["versions"][version]
        tag = f"{listed['tag_prefix']}-{listed['container_version']['gpu']}"
    else:
        listed = json.loads((folder / "pytorch.json").read_text())["training"]["versions"][f"{version}.0"]
        tag = f"{version}-gpu-{listed['py_versions'][-1]}"
        assert f"py{image.python.replace('.', '')}" in listed["py_versions"]
    assert (listed["repository"], tag) == (image.repository, image.tag)
    assert f"cu{image.cuda}" in tag or image.repository == "pytorch-training"
    for region, account in ACCOUNTS.items():
        assert listed["registries"].get(region, account) == account, region


def test_the_table_lacks_no_newer_image_of_its_sdk():
    sdk = importlib.metadata.version("sagemaker") if importlib.util.find_spec("sagemaker") else "none"
    if not sdk.startswith(f"{TABLE_SDK}."):
        pytest.skip(f"the table is of sagemaker {TABLE_SDK}; installed is {sdk}")
    folder = importlib.resources.files("sagemaker.core") / "image_uri_config"
    listed = [
        version
        for name in ("pytorch.json", "pytorch-amzn2023.json")
        for version in json.loads((folder / name).read_text())["training"]["versions"]
    ]
    numbers = {tuple(map(int, version.split(".")[:2])) for version in listed}
    newest = {number for number in numbers if number >= (2, 8)} - {(2, 9)}  # AWS has patched 2.9 until 2026-10
    assert newest == {tuple(map(int, version.split("."))) for version in IMAGES}


def test_packages_are_not_sent_along_for_a_python_that_is_not_known(no_account, rooms, tiny_config, capsys):
    assert image_python(image_address("us-east-1", "2.13")) == "3.12"
    assert image_python(OWN) is None
    options = ["--config", str(tiny_config), "--data", str(rooms), "--dry-run", "--torch", "2.14"]
    assert launch.main([*options, "--network-isolation"]) == 1
    assert "The Python of AWS's image of PyTorch 2.14 is not known here" in capsys.readouterr().err
    assert launch.main(options) == 0
    assert "/pytorch:2.14-cu133-amzn2023-sagemaker" in capsys.readouterr().out


def test_addresses_in_all_partitions():
    assert image_address("us-east-1") == "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.10-gpu-py313"
    assert image_address("us-gov-west-1", "2.13") == (
        "442386744353.dkr.ecr.us-gov-west-1.amazonaws.com/pytorch:2.13-cu133-amzn2023-sagemaker"
    )
    assert image_address("cn-north-1", "2.8").startswith("727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/")
    with pytest.raises(Problem, match=r"--torch 1\.99: the table has images of PyTorch 2\.8"):
        image_address("us-east-1", "1.99")
    with pytest.raises(Problem, match="mars-1"):
        image_address("mars-1")
    for region in ACCOUNTS:
        check_address(image_address(region), region)


def test_what_speaks_against_an_image_is_said():
    today = datetime.date(2026, 11, 29)
    (driver,) = image_notes(image_address("us-east-1", "2.10"), "A10G", today)
    assert "driver of 580" in driver and "--torch 2.8" in driver
    assert image_notes(image_address("us-east-1", "2.8"), "A10G", datetime.date(2026, 8, 6)) == []
    (patches,) = image_notes(image_address("us-east-1", "2.8"), "A10G", today)
    assert "patched the image 2.8-gpu-py312 until 2026-08-06 only; --torch 2.10 is patched" in patches
    (old,) = image_notes(image_address("us-east-1", "2.11"), "V100", today)
    assert "does not know the V100" in old
    late = image_notes(image_address("us-east-1", "2.10"), "A10G", datetime.date(2027, 2, 1))
    assert "patched the image 2.10-gpu-py313 until 2027-01-21 only; --torch 2.11 is patched" in late[0]
    assert image_notes(OWN, "A10G", today) == []


@pytest.mark.parametrize(
    "address", ["foo bar", "docker.io/pytorch", "mine:1", OWN.replace("mine:1", "Mine:1"), OWN[1:]]
)
def test_what_is_no_address_of_an_image_is_refused(address):
    with pytest.raises(Problem, match="no address of an image in ECR"):
        check_address(address, "us-east-1")


def test_an_image_of_another_region_is_refused():
    with pytest.raises(Problem, match="--image is in us-east-1, the job in eu-west-1"):
        check_address(OWN, "eu-west-1")


def test_an_own_image_is_looked_up(account):
    asked = {"registryId": "123456789012", "repositoryName": "mine", "imageIds": [{"imageTag": "1"}]}
    stub, there = account.stub("ecr"), {"images": [{"imageManifest": "{}"}]}
    stub.add_response("batch_get_image", there, asked)
    assert look_up(account, OWN) == "in the registry"
    stub.add_response("batch_get_image", {"images": [], "failures": [{"failureCode": "ImageNotFound"}]}, asked)
    with pytest.raises(Problem, match="the repository mine has no image 1"):
        look_up(account, OWN)
    stub.add_client_error("batch_get_image", "RepositoryNotFoundException")
    with pytest.raises(Problem, match="has no repository 'mine'"):
        look_up(account, OWN)
    stub.add_client_error("batch_get_image", "AccessDeniedException")
    assert look_up(account, OWN) == "not looked up (ecr:BatchGetImage: denied)"
    assert look_up(account, image_address("us-east-1")).startswith("AWS's own")


def test_without_an_account_of_the_user_nothing_is_asked(no_account):
    assert look_up(Account("us-east-1"), image_address("us-east-1", "2.8")).startswith("AWS's own")
