"""Twenty-five plausible mistakes of one line each, and the test that sees it: a test that cannot fail is a defect.

Each mistake is made in a copy of the package, and the test is run on that in a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """A mistake: in which file, which text becomes which, and the test that must fail."""

    file: str
    old: str
    new: str
    test: str


MATCHING = "tests/losses/test_matching_and_losses.py"
GOLDEN_CRITERION = "tests/losses/test_golden_criterion.py"
GOLDEN_PARTS = "tests/model/test_golden_parts.py"
TILING = "tests/inference/test_tiling.py"
CURVES = "tests/metrics/test_curves.py"
EVALUATION = "tests/metrics/test_coco_eval.py"
SAMPLING = "tests/data/test_sampling.py"
STRUCTURES = "tests/test_structures.py"
COCO = "tests/data/test_coco.py"
EMA = "tests/callbacks/test_ema.py"
OPTIM = "tests/training/test_optim.py"
MUTATIONS = [
    # matcher and losses
    Mutation(
        "losses/matcher.py",
        "alpha=self.cost_bbox)",
        "alpha=self.cost_giou)",
        f"{GOLDEN_CRITERION}::test_cost_matrix",
    ),
    Mutation(
        "losses/matcher.py",
        "linear_sum_assignment(costs[layer, image, : targets.num_boxes[image]])",
        "linear_sum_assignment(costs[layer, image, :boxes_per_image])",
        f"{MATCHING}::test_matching_is_the_best_one_to_one_assignment",
    ),
    Mutation(
        "losses/criterion.py",
        "slot = (image + matches.queries) * num_classes + targets.labels",
        "slot = (image + matches.queries) * num_classes",
        f"{GOLDEN_CRITERION}::test_losses_matches_and_gradients",
    ),
    Mutation(
        "losses/criterion.py",
        "divisor = num_boxes * output.num_groups",
        "divisor = num_boxes",
        f"{GOLDEN_CRITERION}::test_losses_matches_and_gradients",
    ),
    Mutation(
        "losses/criterion.py",
        "(distance * counts).flatten(1).sum(1)",
        "distance.flatten(1).sum(1)",
        f"{MATCHING}::test_padding_of_targets_changes_no_loss",
    ),
    # boxes
    Mutation(
        "boxes.py",
        "return iou - (hull - union) / (hull + OVERLAP_EPSILON)",
        "return iou - (hull - intersection) / (hull + OVERLAP_EPSILON)",
        f"{GOLDEN_PARTS}::test_generalized_iou",
    ),
    Mutation(
        "boxes.py",
        "return xyxy_to_cxcywh(boxes_xyxy) / boxes_xyxy.new_tensor([width, height, width, height])",
        "return xyxy_to_cxcywh(boxes_xyxy) / boxes_xyxy.new_tensor([height, width, height, width])",
        f"{STRUCTURES}::test_box_conversions_undo_each_other",
    ),
    # denoising and selection of queries
    Mutation(
        "model/denoising.py",
        "noise.flip < label_noise_ratio * 0.5",
        "noise.flip < label_noise_ratio",
        f"{GOLDEN_PARTS}::test_denoising_queries",
    ),
    Mutation(
        "model/denoising.py",
        "magnitude = noise.magnitude + negative[:, None, None, None]",
        "magnitude = noise.magnitude",
        f"{GOLDEN_PARTS}::test_denoising_queries",
    ),
    Mutation(
        "model/denoising.py",
        "group.masked_fill(index >= slots, num_groups).masked_fill(index >= first, -1)",
        "group.masked_fill(index >= slots, num_groups)",
        f"{GOLDEN_PARTS}::test_denoising_queries",
    ),
    Mutation(
        "model/query_selection.py",
        "usable = ((boxes > 0.01) & (boxes < 0.99)).all(-1)",
        "usable = (boxes > 0.01).all(-1)",
        f"{GOLDEN_PARTS}::test_encoder_proposals_and_reference_points",
    ),
    # from output to detections
    Mutation(
        "model/postprocess.py",
        "labels = top_indices % num_classes",
        "labels = top_indices // num_classes % num_classes",
        f"{GOLDEN_PARTS}::test_postprocess",
    ),
    Mutation(
        "model/postprocess.py",
        "keep = nms(boxes_xyxy, image_scores, nms_iou_threshold)",
        "keep = nms(boxes_xyxy, -image_scores, nms_iou_threshold)",
        f"{GOLDEN_PARTS}::test_postprocess",
    ),
    Mutation(
        "inference/tiling.py",
        "PART_OF_OBJECT = 0.8",
        "PART_OF_OBJECT = 0.99",
        f"{TILING}::test_a_cut_box_that_lies_mostly_in_a_whole_one_is_a_part_of_it",
    ),
    Mutation(
        "inference/tiling.py",
        "windows[view][:, [0, 1, 0, 1]]",
        "windows[view][:, [1, 0, 1, 0]]",
        f"{TILING}::test_an_object_larger_than_a_tile_is_one_box",
    ),
    # ids
    Mutation(
        "detections.py",
        "return [self.category_ids[label] if self.category_ids else label for label in",
        "return [label for label in",
        f"{STRUCTURES}::test_detections_speak_coco",
    ),
    Mutation(
        "data/classes.py",
        "label_of_id = {category_id: label for label, category_id in enumerate(self.category_ids)}",
        "label_of_id = {category_id: label for label, category_id in enumerate(self.category_ids, 1)}",
        f"{COCO}::test_labels_follow_the_sorted_category_ids",
    ),
    # metric
    Mutation(
        "metrics/coco_eval.py",
        "if int(image_id) in self._images:",
        "if image_id is None:",
        f"{EVALUATION}::test_an_image_counts_once",
    ),
    Mutation(
        "metrics/curves.py",
        "index = int(np.argmax(self.f1))",
        "index = self.f1.size - 1 - int(np.argmax(self.f1[::-1]))",
        f"{CURVES}::test_of_equal_f1_the_highest_threshold_is_best",
    ),
    # data of an epoch, resumed
    Mutation(
        "data/loading.py",
        '"batches": self._given}',
        '"batches": max(self._given - 1, 0)}',
        f"{SAMPLING}::test_a_loader_that_goes_on_gives_the_rest_of_the_epoch_and_then_the_next",
    ),
    Mutation(
        "data/loading.py",
        "self._order.skip = given * (self.batch_size or 1)",
        "self._order.skip = given",
        f"{SAMPLING}::test_a_loader_that_goes_on_gives_the_rest_of_the_epoch_and_then_the_next",
    ),
    Mutation(
        "data/sampling.py",
        "order[self.rank :: self.num_replicas]",
        "order[: self.num_samples]",
        f"{SAMPLING}::test_processes_share_the_images_between_them",
    ),
    Mutation(
        "data/sampling.py",
        "seed = derive_seed(self.seed, self.epoch, index,",
        "seed = derive_seed(self.seed, index,",
        f"{SAMPLING}::test_seeds_differ_by_epoch_and_image",
    ),
    # average and schedule
    Mutation(
        "callbacks/ema.py",
        "math.exp(-self.updates / self._tau)",
        "math.exp(-(self.updates - 1) / self._tau)",
        f"{EMA}::test_the_average_is_that_of_a_float64_reference",
    ),
    Mutation(
        "training/schedule.py",
        "if milestone <= self.epoch else 1.0",
        "if milestone < self.epoch else 1.0",
        f"{OPTIM}::test_without_warm_up_the_rates_are_those_of_multi_step_lr",
    ),
]

# Run as a program: imports what takes long, then forks a child for each test, which imports the copy of the package.
RUNNER = """
import json, os, sys
import faster_coco_eval, lightning.pytorch, numpy, PIL.Image, pytest, scipy.optimize, torch, torchvision
sys.dont_write_bytecode = True
copy, tasks = sys.argv[1], json.loads(sys.stdin.read())


class Seen:
    def __init__(self):
        self.called, self.failed = 0, 0

    def pytest_runtest_logreport(self, report):
        self.called += report.when == "call"
        self.failed += report.when == "call" and report.failed


def run(nodes):
    child = os.fork()
    if child == 0:
        code = 9
        try:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 1)
                os.dup2(null.fileno(), 2)
            sys.path.insert(0, copy)
            import dino_lightning
            assert dino_lightning.__file__.startswith(copy)
            seen = Seen()
            options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts="]
            options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # a plugin's package may be imported above
            done = pytest.main([*options, *nodes], plugins=[seen])
            code = 0 if done == 0 and seen.called else 1 if done == 1 and seen.failed else 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


for path, content, nodes in tasks:
    before = None
    if path is not None:
        with open(path) as file:
            before = file.read()
        with open(path, "w") as file:
            file.write(content)
    print(run(nodes), flush=True)
    if before is not None:
        with open(path, "w") as file:
            file.write(before)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_mistake_is_seen(tmp_path):
    package = PROJECT / "dino_lightning"
    without = shutil.ignore_patterns("__pycache__")
    copy = Path(shutil.copytree(package, tmp_path / "dino_lightning", ignore=without))
    shutil.copytree(PROJECT / "configs", tmp_path / "configs")
    tasks = [(None, None, sorted({mutation.test for mutation in MUTATIONS}))]
    for mutation in MUTATIONS:
        text = (copy / mutation.file).read_text()
        assert text.count(mutation.old) == 1, mutation
        tasks.append((str(copy / mutation.file), text.replace(mutation.old, mutation.new), [mutation.test]))
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(tmp_path)],
        input=json.dumps(tasks),
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(tasks), done.stderr
    assert codes[0] == 0, "the tests do not pass without any mistake"
    unseen = [mutation for mutation, code in zip(MUTATIONS, codes[1:], strict=True) if code != 1]
    assert len(MUTATIONS) == 25 and not unseen, unseen
