"""CocoMetric against pycocotools called directly, its bookkeeping, and two processes."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dino_lightning.detections import Detections
from dino_lightning.metrics import CocoMetric
from dino_lightning.metrics import coco_eval as module_under_test
from dino_lightning.structures import GroundTruth

BACKENDS = ("faster_coco_eval", "pycocotools")
COCO_KEYS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def random_dataset(seed, *, num_images=6, num_classes=3, max_boxes=6, max_extra=6, ties=True, crowds=True):
    """Perturbed truth, repeats, strays; empty images on either side; the last class never has a ground-truth box."""
    rng = np.random.default_rng(seed)
    ids = [int(i) for i in rng.choice(10**6, size=num_images, replace=False) + 2**40]
    detections, truths = [], []
    for _ in ids:
        n = int(rng.integers(0, max_boxes + 1))
        corner = rng.uniform(0, 200, (n, 2))
        size = np.exp(rng.uniform(np.log(4), np.log(300), (n, 2)))
        boxes = np.concatenate((corner, corner + size), axis=1)
        labels = rng.integers(0, max(num_classes - 1, 1), n)
        iscrowd = (rng.random(n) < 0.2) & crowds
        truths.append(GroundTruth(boxes, labels, iscrowd, size.prod(axis=1) * rng.uniform(0.5, 1, n)))
        copies = np.repeat(np.arange(n), rng.integers(0, 4, n))
        shifted = boxes[copies] + rng.normal(0, 0.06, (len(copies), 4)) * np.tile(size[copies], 2)
        extra = int(rng.integers(0, max_extra + 1))
        stray = rng.uniform(0, 200, (extra, 2))
        stray = np.concatenate((stray, stray + rng.uniform(4, 150, (extra, 2))), axis=1)
        found = np.concatenate((shifted, stray)) if rng.random() > 0.15 else np.zeros((0, 4))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
        guess = np.concatenate((labels[copies], rng.integers(0, num_classes, extra)))[: len(found)]
        scores = rng.random(len(found))
        if ties:
            scores = np.round(scores, 1)
        order = np.argsort(-scores, kind="stable") if rng.random() < 0.5 else np.arange(len(scores))
        detections.append(
            Detections(
                torch.tensor(found[order], dtype=torch.float32),
                torch.tensor(scores[order], dtype=torch.float32),
                torch.tensor(guess[order], dtype=torch.int64),
            )
        )
    return detections, truths, ids


def reference(detections, truths, ids, num_classes):
    """COCOeval by the book: `loadRes`, `summarize`, and each class from the precision array."""
    annotations = []
    for image_id, truth in zip(ids, truths, strict=True):
        columns = (truth.boxes_xyxy, truth.labels, truth.iscrowd, truth.area)
        for (x1, y1, x2, y2), label, crowd, area in zip(*(c.tolist() for c in columns), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 10,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "iscrowd": int(crowd),
                    "area": area,
                }
            )
    results = [
        {**entry, "category_id": entry["category_id"] + 10}  # ids need not be labels
        for image_id, one in zip(ids, detections, strict=True)
        for entry in one.to_coco(image_id)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth_api = COCO()
        truth_api.dataset = {
            "images": [{"id": image_id} for image_id in ids],
            "categories": [{"id": label + 10, "name": f"class {label}"} for label in range(num_classes)],
            "annotations": annotations,
        }
        truth_api.createIndex()
        if not results:
            empty = COCO()
            empty.dataset = {**truth_api.dataset, "annotations": []}
            empty.createIndex()
        evaluation = COCOeval(truth_api, truth_api.loadRes(results) if results else empty, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(zip(COCO_KEYS, evaluation.stats[:6], strict=True)) | {"AR": evaluation.stats[8]}
    for label in range(num_classes):
        precision = evaluation.eval["precision"][:, :, label, 0, 2]
        expected[f"AP_class/{label}"] = precision[precision > -1].mean() if (precision > -1).any() else -1.0
        precision = precision[0]
        expected[f"AP50 {label}"] = precision[precision > -1].mean() if (precision > -1).any() else -1.0
    return expected, evaluation


def names(num_classes):
    return [str(label) for label in range(num_classes)]


def evaluate(detections, truths, ids, **arguments):
    metric = CocoMetric(**arguments)
    metric.update(detections, truths, ids)
    return metric.compute()


def assert_equal_to_reference(detections, truths, ids, num_classes, backend):
    expected, _ = reference(detections, truths, ids, num_classes)
    metric = CocoMetric(class_names=names(num_classes), backend=backend)
    half = len(ids) // 2
    metric.update(detections[:half], truths[:half], ids[:half])
    metric.update(detections[half:], truths[half:], ids[half:])
    values = metric.compute()
    for row in metric.per_class():
        assert row.ap50 == pytest.approx(expected.pop(f"AP50 {row.label}"), abs=5e-5)
        if num_classes == 1:
            values["AP_class/0"] = row.ap
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, abs=5e-5), key


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 8),
    num_classes=st.integers(1, 5),
    ties=st.booleans(),
    crowds=st.booleans(),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pycocotools(backend, seed, num_images, num_classes, ties, crowds):
    data = random_dataset(seed, num_images=num_images, num_classes=num_classes, ties=ties, crowds=crowds)
    assert_equal_to_reference(*data, num_classes, backend)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_classes=st.integers(1, 2), ties=st.booleans())
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pycocotools_beyond_100_detections(backend, seed, num_classes, ties):
    data = random_dataset(seed, num_images=3, num_classes=num_classes, max_extra=500, max_boxes=120, ties=ties)
    assert_equal_to_reference(*data, num_classes, backend)


def test_f1_counts_the_detections_that_average_precision_does_not():
    boxes = [[20 * index, 0, 20 * index + 10, 10] for index in range(120)]
    values = evaluate([detections_of(boxes)], [truth_of(boxes)], [5])
    assert values["F1"] == values["F1_recall"] == 1 and values["F1_threshold"] == 0.5
    assert values["AR"] == pytest.approx(100 / 120)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_random_datasets_are_worth_measuring(backend):
    # Guards the tests above against agreeing on -1 or on 0 throughout.
    values = evaluate(*random_dataset(3, num_images=20), class_names=names(3), backend=backend)
    for key in (*COCO_KEYS, "AR", "F1", "AP_class/0", "AP_class/1"):
        assert 0.05 < values[key] < 0.95, key
    assert values["AP_class/2"] == values["F1_class/2"] == -1


def truth_of(boxes, labels=None, iscrowd=None, area=None):
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    return GroundTruth(
        boxes,
        np.zeros(len(boxes), np.int64) if labels is None else np.asarray(labels, np.int64),
        np.zeros(len(boxes), np.bool_) if iscrowd is None else np.asarray(iscrowd, np.bool_),
        sides.prod(axis=1) if area is None else np.asarray(area, np.float64),
    )


def detections_of(boxes, scores=None, labels=None, **rest):
    boxes = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.linspace(0.9, 0.5, len(boxes)) if scores is None else torch.as_tensor(scores)
    labels = torch.zeros(len(boxes), dtype=torch.int64) if labels is None else torch.as_tensor(labels)
    return Detections(boxes, scores.float(), labels.long(), **rest)


BOX = [10.0, 10.0, 60.0, 60.0]
FAR = [200.0, 200.0, 260.0, 260.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_perfect_detections_score_one_and_sizes_without_boxes_minus_one(backend):
    values = evaluate([detections_of([BOX])], [truth_of([BOX])], [5], backend=backend)
    assert [values[key] for key in ("AP", "AP50", "AP75", "AP_medium")] == pytest.approx([1] * 4)
    assert values["AR"] == values["F1"] == values["F1_precision"] == values["F1_recall"] == 1
    assert values["F1_threshold"] == pytest.approx(0.9)
    assert values["AP_small"] == values["AP_large"] == -1
    assert not any("class" in key for key in values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_area_is_the_annotated_one(backend):
    values = evaluate([detections_of([BOX])], [truth_of([BOX], area=[100.0])], [5], backend=backend)
    assert values["AP_small"] == pytest.approx(1)
    assert values["AP_medium"] == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_detections_in_a_crowd_region_are_neither_right_nor_wrong(backend):
    crowd = [200.0, 200.0, 400.0, 400.0]
    found = detections_of([FAR, [300.0, 300.0, 350.0, 350.0], BOX])
    values = evaluate([found], [truth_of([crowd, BOX], iscrowd=[True, False])], [1], backend=backend)
    assert values["AP"] == pytest.approx(1)
    assert values["F1"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("found", [[], [BOX]])
def test_no_true_box_at_all_gives_minus_one(backend, found):
    values = evaluate([detections_of(found)], [truth_of([])], [1], backend=backend, class_names=("a", "b"))
    assert set(values.values()) == {-1.0}
    crowd_only = truth_of([FAR], iscrowd=[True])
    values = evaluate([detections_of(found)], [crowd_only], [1], backend=backend, class_names=("a", "b"))
    assert set(values.values()) == {-1.0}


def test_no_image_at_all_gives_minus_one():
    metric = CocoMetric()
    metric.update([], [], [])
    assert set(metric.compute().values()) == {-1.0}
    assert metric.per_class() == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_true_boxes_without_detections_give_zero(backend):
    values = evaluate([detections_of([])], [truth_of([BOX])], [1], backend=backend)
    assert values["AP"] == values["AR"] == values["F1"] == values["F1_threshold"] == 0


def test_f1_overall_has_one_threshold_and_classes_their_own():
    # Class a is right from 0.8 on and wrong at 0.5; class b is right at 0.5. One threshold cannot suit both.
    found = detections_of([BOX, FAR, FAR], scores=[0.8, 0.5, 0.5], labels=[0, 0, 1])
    metric = CocoMetric(class_names=("a", "b"))
    metric.update([found], [truth_of([BOX, FAR], labels=[0, 1])], [1])
    values = metric.compute()
    assert values["F1_class/a"] == values["F1_class/b"] == 1
    assert values["F1"] == pytest.approx(2 * 2 / (3 + 2))
    assert values["F1_precision"] == pytest.approx(2 / 3)
    assert values["F1_recall"] == 1
    assert values["F1_threshold"] == 0.5
    a, b = metric.per_class()
    assert (a.label, a.name, a.num_boxes, a.f1, a.precision, a.recall) == (0, "a", 1, 1, 1, 1)
    assert (b.label, b.name, b.num_boxes, b.threshold) == (1, "b", 1, 0.5)
    assert (a.ap, b.ap) == (values["AP_class/a"], values["AP_class/b"])


def test_f1_iou_threshold():
    shifted = [10.0, 10.0, 60.0, 45.0]  # IoU 0.7 with BOX
    assert evaluate([detections_of([shifted])], [truth_of([BOX])], [1])["F1"] == 1
    assert evaluate([detections_of([shifted])], [truth_of([BOX])], [1], f1_iou_threshold=0.75)["F1"] == 0


def test_an_image_counts_once():
    data = random_dataset(11)
    metric = CocoMetric(class_names=names(3))
    metric.update(*data)
    expected = metric.compute()
    metric.update(*(part[:2] for part in data))
    _, truths, ids = data
    metric.update([detections_of([])], truths[3:4], ids[3:4])  # the first to come stays
    assert metric.compute() == expected
    twice = CocoMetric(class_names=names(3))
    twice.update(*(part + part for part in data))
    assert twice.compute() == expected


def test_compute_twice_update_after_compute_and_reset():
    detections, truths, ids = random_dataset(12)
    whole = evaluate(detections, truths, ids, class_names=names(3))
    part = evaluate(detections[:3], truths[:3], ids[:3], class_names=names(3))
    assert part != whole
    metric = CocoMetric(class_names=names(3))
    with pytest.raises(RuntimeError, match="compute"):
        metric.per_class()
    metric.update(detections[:3], truths[:3], ids[:3])
    assert metric.compute() == part
    metric.compute().clear()  # what is handed out is the caller's own
    assert metric.compute() == part
    metric.update(detections[3:], truths[3:], ids[3:])
    with pytest.raises(RuntimeError, match="compute"):
        metric.per_class()
    assert metric.compute() == whole
    metric.reset()
    with pytest.raises(RuntimeError, match="compute"):
        metric.per_class()
    metric.update(detections[:3], truths[:3], ids[:3])
    assert metric.compute() == part


def test_what_was_evaluated_is_handed_out_until_the_next_image():
    detections, truths, ids = random_dataset(16)
    metric = CocoMetric(class_names=names(3))
    with pytest.raises(RuntimeError, match="compute"):
        metric.evaluated()
    metric.update(detections + detections[:1], truths + truths[:1], ids + ids[:1])
    values = metric.compute()
    evaluated = metric.evaluated()
    assert evaluated.values == values
    assert evaluated.classes == metric.per_class()
    assert evaluated.image_ids == tuple(sorted(ids))
    order = np.argsort(ids)
    for one, index in zip(evaluated.images, order, strict=True):
        assert np.array_equal(one.truth.boxes_xyxy, truths[index].boxes_xyxy)
    valid = evaluated.precision[..., 0][evaluated.precision[..., 0] > -1]
    assert valid.mean() == pytest.approx(values["AP"])
    assert evaluated.matches.curve().best.f1 == values["F1"]
    metric.reset()
    with pytest.raises(RuntimeError, match="compute"):
        metric.evaluated()
    assert len(evaluated.images) == len(ids)  # what was handed out stays


def test_copies_pickles_moves_and_leaves_no_state_dict():
    detections, truths, ids = random_dataset(13)
    whole = evaluate(detections, truths, ids, class_names=names(3))
    metric = CocoMetric(class_names=names(3))
    metric.update(detections[:3], truths[:3], ids[:3])
    metric.to("cpu").to(torch.bfloat16)
    assert metric.state_dict() == {}
    metric.load_state_dict({})
    before = metric.compute()
    for twin in (copy.deepcopy(metric), metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert twin.compute() == before
        twin.update(detections[3:], truths[3:], ids[3:])
        assert twin.compute() == whole
        assert twin.per_class()
    assert metric.compute() == before  # the twins share nothing with it


def test_class_names_come_from_the_detections_and_double_names_stay_apart():
    found = detections_of([BOX], class_names=("door", "window"))
    truth = truth_of([BOX])
    assert "AP_class/window" in evaluate([detections_of([]), found], [truth, truth], [1, 2])
    assert "AP_class/x" in evaluate([found], [truth], [1], class_names=["x", "y"])
    assert {"AP_class/x (0)", "AP_class/x (1)"} <= set(evaluate([found], [truth], [1], class_names=["x", "x"]))
    metric = CocoMetric()
    metric.update([found], [truth], [1])
    metric.update([detections_of([BOX])], [truth], [2])
    assert "AP_class/window" in metric.compute()
    unnamed = evaluate([detections_of([BOX], labels=[2])], [truth], [1])
    assert {"AP_class/0", "AP_class/1", "AP_class/2"} <= set(unnamed)


def test_detections_that_are_not_finite_are_left_out_with_a_warning():
    found = detections_of([BOX, BOX, [0, 0, float("inf"), 5]], scores=[float("nan"), 0.5, 0.4])
    with pytest.warns(UserWarning, match="2 of 3"):
        values = evaluate([found], [truth_of([BOX])], [1])
    assert values["AP"] == pytest.approx(1)
    assert values["F1"] == 1


def test_half_precision_detections():
    found = detections_of([BOX])
    half = Detections(found.boxes_xyxy.bfloat16(), found.scores.half(), found.labels.int())
    assert evaluate([half], [truth_of([BOX])], [1])["AP"] == pytest.approx(1)


def test_backends_are_silent(capfd):
    for backend in BACKENDS:
        evaluate(*random_dataset(14), backend=backend)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "hotcoco"}, "Unknown backend 'hotcoco'"),
        ({"f1_iou_threshold": 0.0}, "f1_iou_threshold is 0.0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CocoMetric(**arguments)


def test_wrong_updates():
    metric = CocoMetric(class_names=("a", "b"))
    with pytest.raises(ValueError, match="1 detections, 1 ground truths and 2 image ids"):
        metric.update([detections_of([BOX])], [truth_of([BOX])], [1, 2])
    with pytest.raises(ValueError, match="Label 2 is out of range; there are 2 class names"):
        metric.update([detections_of([BOX], labels=[2])], [truth_of([BOX])], [1])
    with pytest.raises(ValueError, match="Label -1 is out of range"):
        metric.update([detections_of([BOX])], [truth_of([BOX], labels=[-1])], [1])
    with pytest.raises(TypeError, match="update"):
        metric([detections_of([BOX])], [truth_of([BOX])], [1])


@pytest.mark.gpu
def test_takes_detections_from_a_cuda_device():
    detections, truths, ids = random_dataset(15)
    expected = evaluate(detections, truths, ids)
    on_device = [Detections(one.boxes_xyxy.cuda(), one.scores.cuda(), one.labels.cuda()) for one in detections]
    metric = CocoMetric().cuda()
    metric.update(on_device, truths, ids)
    assert metric.compute() == expected


CLASS_NAMES = ("door", "window", "sink")


def run_rank(rank, folder, data):
    """One of two processes; leaves what it saw in a file."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    seen = {}
    detections, truths, ids = data

    # Image 3 is in both parts, as a DistributedSampler would repeat it.
    mine = slice(0, 4) if rank == 0 else slice(3, None)
    metric = CocoMetric(class_names=CLASS_NAMES)
    metric.update(detections[mine], truths[mine], ids[mine])
    seen["overlap"] = (metric.compute(), metric.per_class())
    seen["evaluated"] = metric.evaluated()
    seen["again"] = (metric.compute(), metric.per_class())
    # A cache on one rank only would leave the other waiting.
    if rank == 1:
        metric.update(detections[:1], truths[:1], ids[:1])
    seen["update on one rank"] = (metric.compute(), metric.per_class())

    # One rank without an image, and so without class names.
    for loaded in (0, 1):
        metric = CocoMetric()
        if rank == loaded:
            named = [Detections(one.boxes_xyxy, one.scores, one.labels, CLASS_NAMES) for one in detections]
            metric.update(named, truths, ids)
        seen[f"all on rank {loaded}"] = (metric.compute(), metric.per_class())

    # A failure on rank 0 reaches both, and both can continue.
    metric = CocoMetric(class_names=CLASS_NAMES)
    metric.update(detections[mine], truths[mine], ids[mine])
    if rank == 0:
        original = module_under_test.average_precision
        module_under_test.average_precision = lambda *_: 1 / 0
    try:
        metric.compute()
    except RuntimeError as error:
        seen["failure"] = str(error)
    if rank == 0:
        module_under_test.average_precision = original
    seen["after failure"] = (metric.compute(), metric.per_class())

    dist.barrier()
    dist.destroy_process_group()
    (Path(folder) / f"seen{rank}").write_bytes(pickle.dumps(seen))


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_see_what_one_sees(tmp_path):
    data = random_dataset(21, num_images=7)
    metric = CocoMetric(class_names=CLASS_NAMES)
    metric.update(*data)
    expected = (metric.compute(), metric.per_class())
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path), data), nprocs=2)
    for rank in (0, 1):
        seen = pickle.loads((tmp_path / f"seen{rank}").read_bytes())
        failure = seen.pop("failure")
        evaluated = seen.pop("evaluated")
        assert (evaluated is None) == (rank == 1)
        if rank == 0:
            assert evaluated.image_ids == tuple(sorted(data[2]))
            assert [len(one.scores) for one in evaluated.images] == [
                len(found) for _, found in sorted(zip(data[2], data[0], strict=True), key=lambda pair: pair[0])
            ]
            assert (evaluated.values, evaluated.classes) == expected
        assert "failed on rank 0" in failure
        assert "ZeroDivisionError" in failure
        assert len(seen) == 6
        for case, result in seen.items():
            assert result == expected, (rank, case)


def test_in_a_lightning_module(tmp_path):
    lightning = pytest.importorskip("lightning")
    detections, truths, ids = random_dataset(31)
    expected = evaluate(detections, truths, ids, class_names=names(3))

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.val_metric = CocoMetric(class_names=names(3))
            self.history = []

        def training_step(self, batch):
            return self.layer(batch.float()[:, None]).sum()

        def validation_step(self, batch):
            rows = batch.tolist()
            self.val_metric.update([detections[i] for i in rows], [truths[i] for i in rows], [ids[i] for i in rows])

        def on_validation_epoch_end(self):
            values = self.val_metric.compute()
            self.val_metric.reset()
            self.history.append(values)
            self.log_dict(values)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    loader = torch.utils.data.DataLoader(torch.arange(len(ids)), batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    module = Module()
    trainer.fit(module, loader, loader)
    assert module.history[1:] == [expected, expected]
    for key, value in expected.items():
        assert trainer.callback_metrics[key].item() == pytest.approx(value, abs=1e-6)
