"""A dataset into S3 and out again: sent once, resumed after an interruption, checked, only the listed images."""

import contextlib
import hashlib
import io
import json
import shutil
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dino_lightning import CocoDataModule
from sagemaker_entry.laptop import dataset_pack, dataset_upload
from sagemaker_entry.laptop.dataset_pack import read_dataset, write_dataset
from sagemaker_entry.laptop.dataset_upload import upload_bytes, upload_dataset, upload_file
from sagemaker_entry.protocol.manifest import FORMAT, MANIFEST, Manifest, extract_safely, unpack_dataset
from sagemaker_entry.protocol.problem import Problem
from tests.conftest import size_of

OWNER = "123456789012"


@pytest.fixture
def plans(rooms, tmp_path):
    folder = tmp_path / "plans"
    shutil.copytree(rooms, folder)
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    """So that a few small images make several shards."""
    monkeypatch.setattr(dataset_pack, "SHARD_BYTES", 20_000)


def dataset_of(folder, **options):
    return read_dataset(CocoDataModule(root=str(folder), **options))


def objects(s3, prefix=""):
    return {entry["Key"]: entry for entry in s3.list_objects_v2(Bucket="bucket", Prefix=prefix).get("Contents", [])}


@pytest.fixture
def s3(aws):
    client = aws("s3")
    client.create_bucket(Bucket="bucket")
    return client


def test_a_dataset_is_sent_once_and_arrives_whole(s3, plans, tmp_path, small_shards, calls):
    dataset = dataset_of(plans)
    assert len(dataset.manifest.shards) > 2
    sent = upload_dataset(s3, dataset, "bucket", "datasets", OWNER)
    assert sent.bytes_sent == dataset.size
    assert sent.uri == f"s3://bucket/datasets/{dataset.key}/"
    puts = [parameters for operation, parameters in calls if operation == "PutObject"]
    assert len(puts) == len(dataset.manifest.files) + 1
    assert puts[-1]["Key"].endswith(MANIFEST)
    for parameters in puts:
        assert parameters["ServerSideEncryption"] == "AES256"
        assert parameters["ExpectedBucketOwner"] == OWNER
        assert "ACL" not in parameters

    calls.clear()
    again = upload_dataset(s3, dataset_of(plans), "bucket", "datasets", OWNER)
    assert again == type(again)(sent.uri, 0)
    assert not [operation for operation, _ in calls if operation == "PutObject"]

    for key in objects(s3):
        target = tmp_path / "channel" / key.removeprefix(f"datasets/{dataset.key}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file("bucket", key, str(target))
    unpack_dataset(tmp_path / "channel", tmp_path / "unpacked")
    for split in ("train", "val"):
        for path in (plans / split).rglob("*.*"):
            assert (tmp_path / "unpacked" / path.relative_to(plans)).read_bytes() == path.read_bytes()


def test_an_interrupted_upload_goes_on_where_it_stopped(s3, plans, small_shards, monkeypatch):
    dataset = dataset_of(plans)
    monkeypatch.setattr(dataset_upload, "THREADS", 1)
    original, sent = type(s3).upload_file, []

    def break_down(self, *args, **kwargs):
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(args[1])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(s3), "upload_file", break_down)
    with pytest.raises(KeyboardInterrupt):
        upload_dataset(s3, dataset, "bucket", "datasets", OWNER)
    assert len(objects(s3)) == 2
    assert not any(key.endswith(MANIFEST) for key in objects(s3))
    monkeypatch.setattr(type(s3), "upload_file", original)
    rest = upload_dataset(s3, dataset, "bucket", "datasets", OWNER)
    there = sum(entry["Size"] for key, entry in objects(s3).items() if not key.endswith(MANIFEST))
    assert there == dataset.size
    assert 0 < rest.bytes_sent < dataset.size


def test_ctrl_c_ends_the_running_transfers_at_once(s3, plans, monkeypatch):
    """A shard of 150 MB may take minutes; a transfer ends at its next part."""
    dataset = dataset_of(plans)
    running, ended = threading.Event(), []

    def endless(self, path, bucket, key, *, Callback, **_):
        running.set()
        try:
            while True:
                Callback(0)
                time.sleep(0.01)
        finally:
            ended.append(key)

    def interrupted(pool, send, files):
        for file in files:
            pool.submit(send, file)
        assert running.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(s3), "upload_file", endless)
    monkeypatch.setattr(dataset_upload.ThreadPoolExecutor, "map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        upload_dataset(s3, dataset, "bucket", "datasets", OWNER)
    assert ended and not objects(s3)


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        ("AccessDenied", "no identity-based policy", ["did not let us write to s3://bucket/", "--kms-key"]),
        ("KMS.DisabledException", "the key is disabled", ["the bucket's encryption key: KMS.DisabledException"]),
        ("ExpiredToken", "the token has expired", ["credentials have expired", "aws sso login"]),
    ],
)
def test_a_refused_upload_is_one_sentence(s3, plans, monkeypatch, code, message, words):
    original = BaseClient._make_api_call

    def refuse(self, operation, parameters):
        if operation == "PutObject":
            raise ClientError({"Error": {"Code": code, "Message": message}}, operation)
        return original(self, operation, parameters)

    monkeypatch.setattr(BaseClient, "_make_api_call", refuse)
    with pytest.raises(Problem) as caught:
        upload_dataset(s3, dataset_of(plans), "bucket", "datasets", OWNER)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("What was sent is kept: the same command sends the rest.")
    for word in words:
        assert word in said, said


def test_a_key_encrypts_everything_that_is_sent(s3, plans, calls):
    upload_dataset(s3, dataset_of(plans), "bucket", "datasets", OWNER, "alias/mine")
    upload_bytes(s3, b"x", "bucket", "small", OWNER, "alias/mine")
    puts = [parameters for operation, parameters in calls if operation == "PutObject"]
    assert len(puts) >= 4
    assert {(put["ServerSideEncryption"], put["SSEKMSKeyId"]) for put in puts} == {("aws:kms", "alias/mine")}


def test_a_part_that_was_deleted_or_cut_is_sent_again(s3, plans, small_shards):
    dataset = dataset_of(plans)
    upload_dataset(s3, dataset, "bucket", "datasets", OWNER)
    first, second = dataset.manifest.shards[:2]
    s3.delete_object(Bucket="bucket", Key=f"datasets/{dataset.key}/{first.name}")
    s3.put_object(Bucket="bucket", Key=f"datasets/{dataset.key}/{second.name}", Body=b"half")
    assert upload_dataset(s3, dataset, "bucket", "datasets", OWNER).bytes_sent == first.size + second.size


def test_the_place_is_the_content(plans, tmp_path):
    before = dataset_of(plans)
    copy = tmp_path / "copy"
    shutil.copytree(plans, copy)
    assert dataset_of(copy).key == before.key
    path = next((copy / "train" / "images").iterdir())
    Image.new("RGB", size_of(path)).save(path)
    assert dataset_of(copy).key != before.key


def test_only_what_the_annotations_name_is_sent(plans):
    (plans / "train" / "images" / "secret.png").write_bytes(b"private")
    (plans / "notes.txt").write_text("private")
    names = [member.name for group in dataset_of(plans).shards.values() for member in group]
    assert len(names) == 12
    assert not [name for name in names if "secret" in name]


@pytest.fixture
def credentials(tmp_path):
    path = tmp_path / "home" / "credentials"
    path.parent.mkdir()
    path.write_text("secret")
    return path


@pytest.mark.parametrize("kind", ["file", "folder", "relative", "annotations"])
def test_a_link_out_of_the_dataset_is_not_followed(plans, tmp_path, kind):
    home = tmp_path / "home"
    home.mkdir()
    images = plans / "train" / "images"
    moved = plans / "val" / "annotations.json" if kind == "annotations" else images / "000002.png"
    if kind == "folder":
        shutil.copytree(images, home / "images")
        shutil.rmtree(images)
        images.symlink_to(home / "images")
        target, more = home / "images" / "000001.png", r" \(And 7 more files\.\)"
    else:
        target, more = home / "private", ""
        moved.rename(target)
        moved.symlink_to(Path("../../../home/private") if kind == "relative" else target)
    listed = images / "000001.png" if kind == "folder" else moved
    expected = f"^{listed}: a link leads to {target}, outside of the dataset {plans}, .*--data.train_images\\.{more}$"
    with pytest.raises(Problem, match=expected):
        dataset_of(plans)


def test_links_within_the_dataset_are_sent_as_what_they_lead_to(plans, tmp_path):
    first, second = (plans / "train" / "images" / f"00000{number}.png" for number in (1, 2))
    second.unlink()
    second.symlink_to("../images/000001.png")
    shared = plans / "all"
    (plans / "val" / "images").rename(shared)
    (plans / "val" / "images").symlink_to(shared)
    linked = tmp_path / "linked"
    linked.symlink_to(plans)  # the user's own way to the dataset
    write_dataset(dataset_of(linked), tmp_path / "stored")
    unpack_dataset(tmp_path / "stored", tmp_path / "unpacked")
    assert (tmp_path / "unpacked/train/images/000002.png").read_bytes() == first.read_bytes()
    assert not [path for path in (tmp_path / "unpacked").rglob("*") if path.is_symlink()]
    assert len(list((tmp_path / "unpacked/val/images").iterdir())) == 4


def test_a_folder_that_the_user_named_is_the_datasets(plans, tmp_path):
    shutil.move(plans / "train" / "images", tmp_path / "elsewhere")
    (plans / "train" / "images").symlink_to(tmp_path / "elsewhere")
    named = {"train_annotations": "train/annotations.json", "val_annotations": "val/annotations.json"}
    assert dataset_of(plans, train_images=str(tmp_path / "elsewhere"), **named).manifest.images == 12
    with pytest.raises(Problem, match="outside of the dataset"):
        dataset_of(plans, train_images=str(plans / "train" / "images"), **named)


def test_what_is_no_image_is_told_before_anything_is_sent(plans, credentials):
    path = plans / "train" / "images" / "000002.png"
    path.write_bytes(credentials.read_bytes())
    with pytest.raises(Problem, match=f"^{path} is not an image that can be read. .*nothing was uploaded.$"):
        dataset_of(plans)
    (plans / "val" / "images" / "000001.png").write_bytes(b"")
    with pytest.raises(Problem, match=r"000002\.png is not an image .*nothing was uploaded\. \(And 1 more files\.\)$"):
        dataset_of(plans)


def test_a_held_out_part_goes_with_its_file_and_is_held_out_again(plans, tmp_path):
    shutil.rmtree(plans / "val")
    data = CocoDataModule(root=str(plans), val_fraction=0.25)
    write_dataset(read_dataset(data), tmp_path / "stored")
    unpack_dataset(tmp_path / "stored", tmp_path / "unpacked")
    again = CocoDataModule(root=str(tmp_path / "unpacked"), val_fraction=0.25)
    for one, other in ((data.train_set, again.train_set), (data.val_set, again.val_set)):
        assert one.annotations.images == other.annotations.images


@pytest.mark.parametrize(
    "options",
    [
        {"test_annotations": "val/annotations.json"},
        {"val_annotations": "train/annotations.json"},
        {"val_annotations": "train/annotations.json", "test_annotations": "train/annotations.json"},
        {"test_annotations": "train/annotations.json"},
        {"test_annotations": "train/annotations.json", "without": "val"},
        {"train_annotations": "val/annotations.json", "without": "val"},
    ],
    ids=str,
)
def test_splits_that_share_a_file_arrive_as_they_were(plans, tmp_path, options):
    options = dict(options)
    if options.pop("without", None):
        (plans / "val").rename(plans / "elsewhere")
        options = {name: place.replace("val/", "elsewhere/") for name, place in options.items()}
    data = CocoDataModule(root=str(plans), val_fraction=0.25, **options)
    write_dataset(read_dataset(data), tmp_path / "stored")
    unpack_dataset(tmp_path / "stored", tmp_path / "unpacked")
    again = CocoDataModule(root=str(tmp_path / "unpacked"), val_fraction=0.25)
    for name in ("train_set", "val_set", "test_set"):
        here, there = getattr(data, name), getattr(again, name)
        assert (here is None) == (there is None), name
        if here is None:
            continue
        assert there.annotations.images == here.annotations.images, name
        for index in range(len(here.annotations.images)):
            one, other = here.annotations.image_path(index), there.annotations.image_path(index)
            assert one.read_bytes() == other.read_bytes(), name


def as_yolo(root: Path, folder: Path) -> dict[str, Any]:
    for split in ("train", "val"):
        content = json.loads((root / split / "annotations.json").read_text())
        for image in content["images"]:
            for kind in ("images", "labels"):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(
                root / split / "images" / image["file_name"], folder / f"images/{split}/{image['file_name']}"
            )
            side = np.array([image["width"], image["height"]] * 2)
            boxes = [np.array(entry["bbox"]) for entry in content["annotations"] if entry["image_id"] == image["id"]]
            shares = [np.concatenate((box[:2] + box[2:] / 2, box[2:])) / side for box in boxes]
            lines = [" ".join(map(str, ("0", *share.tolist()))) for share in shares]
            (folder / f"labels/{split}/{Path(image['file_name']).stem}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [room]\n")
    return {}


def as_parts(root: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    shutil.copytree(root / "train" / "images", folder / "images")
    content = json.loads((root / "train" / "annotations.json").read_text())
    for number, image in enumerate(content["images"]):
        image["split"] = "val" if number % 3 == 0 else "train"
    (folder / "annotations.json").write_text(json.dumps(content))
    return {}


def as_two_files(root: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(root, folder)
    content = json.loads((folder / "train" / "annotations.json").read_text())
    for name, images in (("a", content["images"][:5]), ("b", content["images"][5:])):
        (folder / f"train/{name}.json").write_text(json.dumps({**content, "images": images, "annotations": [
            entry for entry in content["annotations"] if entry["image_id"] in {image["id"] for image in images}
        ]}))  # fmt: skip
    return {"train_annotations": ["train/a.json", "train/b.json"], "merge_classes": {"space": ["room"]}}


@pytest.mark.parametrize("change", [as_yolo, as_parts, as_two_files])
def test_what_is_not_one_coco_file_for_each_split_is_sent_as_such(plans, tmp_path, change):
    options = change(plans, tmp_path / "changed")
    data = CocoDataModule(root=str(tmp_path / "changed"), **options)
    write_dataset(read_dataset(data), tmp_path / "stored")
    unpack_dataset(tmp_path / "stored", tmp_path / "unpacked")
    options.pop("train_annotations", None)
    again = CocoDataModule(root=str(tmp_path / "unpacked"), **options)
    assert again.class_names == data.class_names and again.category_ids == data.category_ids
    assert sorted(path.name for path in (tmp_path / "unpacked").iterdir() if path.is_dir()) == ["train", "val"]
    for name in ("train_set", "val_set"):
        here, there = getattr(data, name).annotations, getattr(again, name).annotations
        assert there.images == here.images and len(here.images) > 0, name
        assert there.offsets.tolist() == here.offsets.tolist()
        assert there.boxes_xyxy == pytest.approx(here.boxes_xyxy, abs=1e-5)
        for index in range(len(here.images)):
            assert here.image_path(index).read_bytes() == there.image_path(index).read_bytes()


def test_a_missing_image_is_named(plans):
    path = plans / "train" / "images" / "000003.png"
    path.unlink()
    # with on_bad_image=error, the data module has refused it before
    with pytest.raises(Problem, match=r"Image 3 of .*annotations\.json: .*000003\.png does not exist"):
        dataset_of(plans, on_bad_image="skip")


def test_small_things_and_weights_are_sent_once(s3, tmp_path, calls):
    for _ in range(2):
        assert upload_bytes(s3, b"code", "bucket", "code/1/source.tar.gz", OWNER) == "s3://bucket/code/1/source.tar.gz"
    weights = tmp_path / "it's.pth"
    weights.write_bytes(b"w" * 1000)
    places = {upload_file(s3, weights, "bucket", "weights", OWNER) for _ in range(2)}
    assert len(places) == 1
    assert len([1 for operation, _ in calls if operation == "PutObject"]) == 2


# ------------------------------------------------------------------ unpacking


@pytest.fixture
def stored(plans, tmp_path, small_shards):
    write_dataset(dataset_of(plans), tmp_path / "stored")
    return tmp_path / "stored"


def test_a_damaged_shard_is_refused_and_nothing_half_done_is_left(stored, tmp_path):
    shard = sorted((stored / "shards").iterdir())[-1]
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(Problem, match="is damaged"):
        unpack_dataset(stored, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()
    shard.unlink()
    with pytest.raises(Problem, match="is missing"):
        unpack_dataset(stored, tmp_path / "unpacked")


def test_each_shard_is_read_once_as_fastfile_streams_it(stored, tmp_path, monkeypatch):
    opened, original = [], io.open

    def spy(file, *args, **kwargs):
        opened.append(str(file))
        return original(file, *args, **kwargs)

    monkeypatch.setattr("io.open", spy)
    monkeypatch.setattr("tarfile.bltn_open", spy)
    unpack_dataset(stored, tmp_path / "unpacked")
    assert sorted(name for name in opened if name.endswith(".tar")) == sorted(map(str, stored.glob("shards/*.tar")))


def test_a_full_disk_is_said_beforehand(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000})())
    with pytest.raises(Problem, match="choose a larger instance"):
        unpack_dataset(stored, tmp_path / "unpacked")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"format": "another"}', '{"format": "dino_lightning dataset 1"}', "[" * 99999],
    ids=["cut", "list", "empty", "format", "short", "deep"],
)
def test_manifests_of_others(text):
    with pytest.raises(Problem, match="is no manifest"):
        Manifest.from_json(text, "here")


def archive_of(path, name, kind=tarfile.REGTYPE, link=""):
    with tarfile.open(path, "w:gz") as tar:
        good = tarfile.TarInfo("good.txt")
        good.size = 4
        tar.addfile(good, io.BytesIO(b"good"))
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname = kind, link
        if kind == tarfile.REGTYPE:
            bad.size = 3
        tar.addfile(bad, io.BytesIO(b"bad"))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../evil.txt", tarfile.REGTYPE, ""),
        ("/tmp/evil-dino.txt", tarfile.REGTYPE, ""),
        ("a/../../evil.txt", tarfile.REGTYPE, ""),
        ("link", tarfile.SYMTYPE, "/etc/passwd"),
        ("hard", tarfile.LNKTYPE, "good.txt"),
        ("pipe", tarfile.FIFOTYPE, ""),
        ("device", tarfile.CHRTYPE, ""),
        ("good.txt", tarfile.REGTYPE, ""),
        ("./good.txt", tarfile.REGTYPE, ""),
        ("a\\..\\..\\evil.txt", tarfile.REGTYPE, ""),
        ("out/evil.txt", tarfile.REGTYPE, ""),
    ],
    ids=str,
)
def test_archives_that_would_leave_the_folder_are_refused(tmp_path, name, kind, link):
    target = tmp_path / "inside" / "target"
    target.mkdir(parents=True)
    (target / "out").symlink_to(tmp_path)
    with pytest.raises(Problem, match="is not unpacked"):
        extract_safely(archive_of(tmp_path / "a.tar.gz", name, kind, link), target)
    assert not list(tmp_path.rglob("evil*"))
    assert sorted(path.name for path in target.iterdir()) == ["good.txt", "out"]
    assert (target / "good.txt").read_text() == "good"


PARTS = st.sampled_from(
    ["..", ".", "", "a", "b.json", "images", "out", "in", "~", "C:", "..\\..", "\0", "\ud800", "x" * 300]
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map("/".join)


def everything(folder):
    return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(manifest_names=st.lists(NAMES, max_size=2), member_names=st.lists(NAMES, max_size=3))
@example(manifest_names=["a/../../b.json"], member_names=[])
@example(manifest_names=["x" * 300], member_names=["a", "x" * 300])
@example(manifest_names=["out/b.json"], member_names=["a", "./a"])
def test_whatever_a_dataset_names_nothing_is_written_outside(tmp_path_factory, manifest_names, member_names):
    place = tmp_path_factory.mktemp("names")
    source, target = place / "channel", place / "scratch" / "dataset"
    (source / "shards").mkdir(parents=True)
    target.parent.mkdir()
    (place / "secret").mkdir()
    (source / "out").symlink_to(place / "secret")
    (source / "in").symlink_to(source / "shards")
    for outside in (place / "secret" / "b.json", place / "b.json", source / "b.json"):
        outside.write_bytes(b"content")
    shard = source / "shards" / "1.tar"
    with tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in member_names:
            info = tarfile.TarInfo(name)
            info.size = 3
            with contextlib.suppress(ValueError):  # tar stores no such name
                tar.addfile(info, io.BytesIO(b"new"))
    entries = [{"name": name, "size": 7, "sha256": content_hash(b"content")} for name in manifest_names]
    stored = {"name": "shards/1.tar", "size": shard.stat().st_size, "sha256": content_hash(shard.read_bytes())}
    images = len(set(member_names))
    content = {"format": FORMAT, "annotations": entries, "shards": [stored], "images": images}
    (source / MANIFEST).write_text(json.dumps(content))
    before = everything(place)
    try:
        unpack_dataset(source, target)
    except Problem as problem:
        assert "\n" not in str(problem)
        assert not target.exists()
    inside = (target.parent / f".{target.name}.partial", target)
    after = {
        path: content
        for path, content in everything(place).items()
        if not any(path.is_relative_to(each) for each in inside)
    }
    assert after == before
    shutil.rmtree(place)


def content_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("key", ["annotations", "shards"])
@pytest.mark.parametrize(
    "name",
    [
        "a/../../evil.json",
        "/tmp/evil.json",
        "..",
        "",
        ".",
        "a\\..\\evil.json",
        "out/evil.json",
        "train/annotations.json",
    ],
)
def test_a_manifest_that_names_other_places_is_refused_in_one_sentence(stored, tmp_path, key, name):
    (tmp_path / "evil.json").write_text("{}")
    (stored / "out").symlink_to(tmp_path)
    content = json.loads((stored / MANIFEST).read_text())
    content[key].append({"name": name, "size": 2, "sha256": content_hash(b"{}")})
    (stored / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(Problem, match=r"(lists '.*'|leads out) .*is not unpacked\.$"):
        unpack_dataset(stored, tmp_path / "scratch" / "deep" / "unpacked")
    assert sorted(path.name for path in tmp_path.rglob("evil*")) == ["evil.json"]
    assert not (tmp_path / "scratch" / "deep" / "unpacked").exists()


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(b"hello")
    with pytest.raises(Problem, match="cannot be unpacked"):
        extract_safely(tmp_path / "a.tar.gz", tmp_path)


def test_the_manifest_names_every_part(stored):
    content = json.loads((stored / MANIFEST).read_text())
    assert content["images"] == 12
    assert {entry["name"] for entry in content["annotations"]} == {"train/annotations.json", "val/annotations.json"}
