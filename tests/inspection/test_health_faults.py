"""Every fault ends as a named finding of `inspect`, and in `fit` as a sentence or a counted skip; nothing else."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dino_lightning.__main__ import run
from dino_lightning.data import CocoDataModule
from dino_lightning.data.splits import resolve_split_files
from dino_lightning.errors import DataError
from dino_lightning.inspection.inspect import inspect_dataset
from dino_lightning.inspection.text import as_json, as_text
from tests.inspection.faults import FAULTS, break_dataset, write_dataset

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return lambda: folder / str(next(NUMBERS))


def inspected(root: Path):
    """The report as JSON, or None with the sentence why there is none."""
    explicit = dict.fromkeys(("train", "val", "test"), (None, None))
    try:
        report = inspect_dataset(resolve_split_files(root, explicit), root=root, progress=False)
    except DataError as error:
        assert_is_a_sentence(str(error))
        return None
    assert_fits_a_terminal(as_text(report))
    return json.loads(json.dumps(as_json(report)))


def inspected_by_command(root: Path, capsys: pytest.CaptureFixture[str]):
    """As `inspected`, from the files that the command writes."""
    capsys.readouterr()
    output = root.with_name(root.name + "-report")
    code = run(["inspect", "--data.root", str(root), "--output", str(output)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert_fits_a_terminal(printed.out.replace(str(output), ""))
    if not output.exists():
        assert code == 1
        assert_is_a_sentence(printed.err.strip().splitlines()[-1].removeprefix("error: "))
        return None
    page = (output / "health.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>") and "<script" not in page
    report = json.loads((output / "health.json").read_text(encoding="utf-8"))
    assert code == (1 if report["counts"]["error"] else 0)
    return report


def assert_fits_a_terminal(printed: str) -> None:
    printed.encode("utf-8")
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines()), default=0) <= 100


def assert_is_a_sentence(message: str) -> None:
    assert message.count("\n") == 0 and len(message) < 1500, message


def trained(root: Path, on_bad_image: str) -> tuple[str, str]:
    """How one pass over the loaders ends: "refused" with its sentence, or "trained" with what was warned of."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = CocoDataModule(
                root=str(root), batch_size=1, num_workers=0, image_size=32, max_size=48, on_bad_image=on_bad_image
            )
            seen = [image_id for batch in data.train_dataloader() for image_id in batch.image_ids]
            seen += [image_id for batch in data.val_dataloader() for image_id in batch.image_ids]
            assert seen
    except DataError as error:
        assert_is_a_sentence(str(error))
        return "refused", str(error)
    return "trained", "\n".join(str(warning.message) for warning in caught)


def kinds(report) -> set[str]:
    return {finding["kind"] for finding in report["findings"]}


def test_there_are_enough_faults():
    assert len(FAULTS) >= 40


def test_the_dataset_that_is_broken_is_sound(places, capsys):
    root = places()
    write_dataset(root)
    assert inspected(root) == inspected_by_command(root, capsys)
    assert inspected(root)["findings"] == []
    assert trained(root, "error") == ("trained", "")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_does_not_surprise_training(name, places):
    fault = FAULTS[name]
    root = places()
    break_dataset(root, fault)
    report = inspected(root)
    if fault.kind:
        assert fault.kind in kinds(report)
    elif fault.ends == "refused":
        assert report is None
    else:
        assert report["counts"]["error"] == 0

    end, sentence = trained(root, "error")
    assert end == ("trained" if fault.ends == "trains" else "refused"), sentence
    end, sentence = trained(root, "skip")
    assert end == ("refused" if fault.ends == "refused" else "trained"), sentence
    if fault.ends == "bad image":
        assert "1 of 4 images cannot be read and are left out" in sentence


@pytest.mark.slow
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(names=st.lists(st.sampled_from(list(FAULTS)), min_size=2, max_size=4, unique=True))
def test_faults_together_are_found_and_do_not_surprise_training(names, places, capsys):
    root = places()
    break_dataset(root, *(FAULTS[name] for name in names))
    report = inspected_by_command(root, capsys)
    if report is None:
        assert trained(root, "error")[0] == trained(root, "skip")[0] == "refused"
        return
    end, sentence = trained(root, "error")
    assert end == ("refused" if report["counts"]["error"] else "trained"), (names, sentence)
    end, sentence = trained(root, "skip")
    unreadable = {"image-missing", "image-undecodable"} & kinds(report)
    if end == "trained" and unreadable:
        assert "cannot be read and are left out" in sentence
    if end == "refused":
        assert report["counts"]["error"], (names, sentence)
