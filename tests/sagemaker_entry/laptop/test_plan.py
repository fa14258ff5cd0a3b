"""Instances, time and money: against hand-worked cases."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sagemaker_entry.laptop import plan
from sagemaker_entry.laptop.account import Account
from sagemaker_entry.laptop.cheaper import cheaper_choice
from sagemaker_entry.laptop.compute import Compute, choose_compute
from sagemaker_entry.laptop.estimate import Work, estimate_hours
from sagemaker_entry.laptop.length import Length
from sagemaker_entry.laptop.plan import Plan, about, choose_limits
from sagemaker_entry.laptop.preflight import resolve_role
from sagemaker_entry.protocol.instances import INSTANCES, PRICES_DATE, Instance
from sagemaker_entry.protocol.problem import Problem

WORK = Work(
    train_images=1000,
    val_images=100,
    length=Length(50),
    batch_size=2,
    teraflops=0.35,
    parameters=46_000_000,
)


def compute(**options):
    return choose_compute(**{"gpus": None, "instance_type": None, "count": None, "wanted": 2, **options})


def test_two_a10g_are_two_g5_2xlarge_and_it_is_said():
    chosen = compute()
    assert (chosen.instance_type, chosen.count, chosen.gpus) == ("ml.g5.2xlarge", 2, 2)
    assert chosen.price == pytest.approx(3.03)
    assert any("ONE A10G" in note and "2 instances" in note for note in chosen.notes)


def test_fewer_gpus_than_the_configuration_is_made_for_are_pointed_out():
    (fewer, batch) = compute(instance_type="g5.2xlarge", count=1).notes
    assert "made for 2 GPUs, but 1 x ml.g5.2xlarge has only 1" in fewer
    assert "2 times as long" in fewer
    assert "global batch changes" in batch


def test_all_gpus_of_a_larger_instance_train_and_it_is_said():
    chosen = compute(gpus=2, instance_type="ml.g5.12xlarge")
    assert (chosen.count, chosen.gpus) == (1, 4)
    assert any("has 4 GPUs, not 2" in note for note in chosen.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"instance_type": "ml.g5.3xlarge"}, ["no instance type ml.g5.3xlarge", "ml.g5.2xlarge"]),
        ({"gpus": 2, "instance_type": "ml.g5.2xlarge", "count": 1}, ["contradict", "1 x ml.g5.2xlarge has 1 A10G"]),
        ({"gpus": 0}, ["at least 1"]),
        ({"count": 0}, ["at least 1"]),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(Problem) as caught:
        compute(**options)
    for word in words:
        assert word in str(caught.value)


def test_no_g5_has_two_gpus():
    assert {instance.gpus for name, instance in INSTANCES.items() if name.startswith("ml.g5")} == {1, 4, 8}


def test_steps_are_counted_as_the_loader_counts_them():
    assert WORK.on(2).batches == 250
    assert dataclasses.replace(WORK, train_images=1001).on(2).batches == 250  # 501 each, 250 full batches
    assert dataclasses.replace(WORK, train_images=3, batch_size=4).on(2).batches == 1


# (options, on so many GPUs) -> what is computed of 1,000 training and 100 validation images, batches of 2 on each GPU
LENGTHS = [
    ({}, 2, {"batches": 250, "steps": 12_500, "all_batches": 12_500, "evaluations": 50, "val_images": 100}),
    ({"max_steps": 1000}, 2, {"epochs": 4, "steps": 1000, "all_batches": 1000, "evaluations": 4}),
    ({"max_steps": 1001}, 2, {"epochs": 5, "steps": 1001, "all_batches": 1001, "evaluations": 4}),
    ({"max_epochs": None, "max_steps": 500}, 2, {"epochs": 2, "steps": 500, "evaluations": 2}),
    ({"max_steps": 100}, 2, {"epochs": 1, "evaluations": 0}),
    ({"accumulate_grad_batches": 4}, 2, {"steps": 50 * 63, "all_batches": 12_500}),  # 63: the last one has 2 batches
    ({"accumulate_grad_batches": 4, "max_steps": 64}, 2, {"all_batches": 254, "evaluations": 1}),
    ({"limit_train_batches": 10, "limit_val_batches": 3, "val_batch_size": 4}, 2, {"batches": 10, "val_images": 24}),
    ({"limit_train_batches": 0.1, "limit_val_batches": 0.5}, 2, {"batches": 25, "val_images": 50}),
    ({"limit_val_batches": 0}, 2, {"evaluations": 0}),
    ({"check_val_every_n_epoch": 20}, 2, {"evaluations": 2}),
    ({"val_check_interval": 0.25}, 2, {"evaluations": 200}),
    ({"val_check_interval": 100}, 2, {"evaluations": 100}),
    ({"val_check_interval": 1000, "check_val_every_n_epoch": None}, 2, {"evaluations": 12}),
    ({"auto_batch_size": 16}, 4, {"batch_size": 4, "batches": 62}),
]


@pytest.mark.parametrize(("options", "gpus", "expected"), LENGTHS)
def test_what_is_computed_follows_from_the_options(options, gpus, expected):
    work = dataclasses.replace(WORK, length=Length(**{"max_epochs": 50, **options}))
    amount = dataclasses.asdict(work.on(gpus))
    assert {name: amount[name] for name in expected} == expected


def test_accumulated_batches_exchange_gradients_once():
    """Two g5.2xlarge at worst: 4 batches of 0.75 s and one exchange of 0.2944 s for each of the steps."""
    work = dataclasses.replace(WORK, length=Length(50, accumulate_grad_batches=4, limit_train_batches=248))
    worst = estimate_hours(work, compute())[2]
    evaluation = 50 * 0.35 / (70 * 0.04) + 15
    assert worst == pytest.approx((300 + 50 * 62 * (4 * 0.75 + 0.2944) + 50 * evaluation) / 3600)
    halved = estimate_hours(dataclasses.replace(work, compressed=True), compute())[2]
    assert worst - halved == pytest.approx(50 * 62 * 0.1472 / 3600)


def test_the_estimate_by_hand():
    """One g5.2xlarge: no exchange between hosts, so all is computation.

    A forward pass takes 0.35 / (70 x 0.08) = 0.0625 s likely; a step of two images 3 x 0.0625 x 2 = 0.375 s. 500 steps
    x 50 epochs = 9,375 s. An evaluation: 100 x 0.0625 + 15 = 21.25 s, 50 of them 1,062.5 s. With 300 s to start:
    10,737.5 s = 2.98264 h. At best (15 %) all but start and the 15 s shrinks by 8/15, at worst (4 %) it doubles.
    """
    best, likely, worst = estimate_hours(WORK, compute(count=1))
    assert likely == pytest.approx(10737.5 / 3600)
    assert best == pytest.approx((300 + 9375 * 8 / 15 + 50 * (6.25 * 8 / 15 + 15)) / 3600)
    assert worst == pytest.approx((300 + 2 * 9375 + 50 * (2 * 6.25 + 15)) / 3600)


def test_the_exchange_of_gradients_by_hand():
    """Two g5.2xlarge: 46 M x 4 bytes x 8 bits x 2 x (2 - 1) / 2 at 5 Gb/s = 0.2944 s a step.

    Computation of a step: 0.2 s at best, 0.375 s likely, 0.75 s at worst. At best the exchange hides the computation
    (0.2944), likely half of it is added (0.5222), at worst all of it (1.0444). 250 steps x 50 epochs.
    """
    chosen = compute()
    best, likely, worst = estimate_hours(WORK, chosen)
    evaluations = [50 * (50 * 0.35 / (70 * share) + 15) for share in (0.15, 0.08, 0.04)]
    assert best == pytest.approx((300 + 12500 * 0.2944 + evaluations[0]) / 3600)
    assert likely == pytest.approx((300 + 12500 * (0.375 + 0.1472) + evaluations[1]) / 3600)
    assert worst == pytest.approx((300 + 12500 * (0.75 + 0.2944) + evaluations[2]) / 3600)


def limits(**options):
    plain = {"max_run_hours": None, "max_cost": None, "spot": False, "max_wait_hours": None}
    return choose_limits((2.0, 4.0, 8.0), compute(), **{**plain, **options})


def test_limits():
    assert limits().max_run == 10 * 3600
    assert limits().max_cost == pytest.approx(30.30)
    assert limits().max_wait is None
    capped = limits(max_cost=6.06)
    assert capped.max_run == 2 * 3600
    assert capped.max_cost <= 6.06
    assert limits(max_run_hours=1000).max_run == 5 * 24 * 3600  # SageMaker's own limit
    assert limits(spot=True, max_run_hours=3).max_wait == 27 * 3600
    assert limits(spot=True, max_run_hours=3, max_wait_hours=5).max_wait == 5 * 3600
    with pytest.raises(Problem, match="over before training begins"):
        limits(max_cost=0.10)
    with pytest.raises(Problem, match="must not be below"):
        limits(spot=True, max_run_hours=3, max_wait_hours=2)


def test_the_table_says_all_one_wants_to_know_before_paying():
    chosen = compute()
    hours = estimate_hours(WORK, chosen)
    made = Plan(chosen, WORK, hours, limits(), False, "image:tag", {"dataset": "s3://bucket/data/"})
    table = made.table()
    for words in (
        "2 x ml.g5.2xlarge, $3.03 an hour",
        "2 x A10G with 24 GB",
        "4 (2 on each GPU)",
        "250 x 50 epochs = 12,500",
        "image:tag",
        "s3://bucket/data/",
        "about $6.50 ($4 to $12)",  # 2.148, 1.337 and 4.005 hours at $3.03
        "about $2 to $4, with interruptions",
        "10.0 hours, then it is stopped: $30.30",
        "ESTIMATE, not a measurement",
        PRICES_DATE,
        "AWS list prices",
        "ONE A10G",
    ):
        assert words in table, words


@pytest.mark.parametrize(
    ("dollars", "text"),
    [
        (0.02, "$0.10"),
        (0.44, "$0.40"),
        (1.26, "$1.30"),
        (7.8, "$8"),
        (8.33, "$8.50"),
        (20.3, "$20"),
        (1234.0, "$1,230"),
    ],
)
def test_estimated_dollars_are_rounded(dollars, text):
    assert about(dollars) == text


def test_the_plan_shows_what_the_options_change():
    chosen = compute()

    def table(**options):
        work = dataclasses.replace(WORK, length=Length(**{"max_epochs": 50, **options}))
        return " ".join(Plan(chosen, work, estimate_hours(work, chosen), limits(), False, "i", {}).table().split())

    assert "16 (2 on each GPU, 4 batches accumulated)" in table(accumulate_grad_batches=4)
    assert "1,001 (trainer.max_steps), 250 in an epoch, 4 evaluations" in table(max_steps=1001)
    assert "leaves no model" in table(max_steps=10) and "leaves no model" not in table()
    automatic = table(auto_batch_size=16)
    assert "16 (--auto_batch_size: as many at once" in automatic and "about 62 x 50 epochs" in automatic
    assert "at most about 2.1 hours (1.3 to 4.0): early stopping may end it sooner" in table(
        ends_early="early stopping"
    )


def test_the_rows_of_the_plan_fit_80_columns_and_break_no_command_and_no_address():
    chosen, address = compute(), "s3://sagemaker-us-east-1-123456789012/dino-lightning/runs/a-rather-long-name/output/"
    command = "`python -m dino_lightning weights get dino_r50_4scale_24ep`"
    places = {
        "weights": f"dino_r50_4scale_24ep, fetched by the job; {command} first sends them along",
        "model": address,
    }
    cheaper = (
        "1 x ml.g5.2xlarge (--instance-count 1): about $0.60, 46% less, and 9% more time; the global batch is then 2"
    )
    plan = Plan(chosen, WORK, estimate_hours(WORK, chosen), limits(), False, "i", places, cheaper=cheaper)
    rows = plan.table().split("\n\n")[0].splitlines()
    assert [row for row in rows if len(row) > 80] == [f"  model         {address}"]
    assert any(row.startswith(f"{' ' * 16}{command}") for row in rows)
    assert all(row.startswith(("Plan", "  ")) for row in rows) and len(rows) > 14


def test_the_cheaper_choice_follows_from_the_estimate():
    """1,000 plans of R50 4-scale: 2.575 hours at $3.03 on two hosts, 3.820 hours at $1.515 on one."""
    work = Work(1000, 100, Length(50), 2, 0.4594, 46_601_482)
    assert cheaper_choice(work, compute(), estimate_hours(work, compute())[1]) == (
        "1 x ml.g5.2xlarge (--instance-count 1): about $6, 26% less, and 48% more time (about 3.8 hours); the global "
        "batch is then 2"
    )
    assert "about $12, 26% less" in cheaper_choice(work, compute(), 2 * estimate_hours(work, compute())[1])  # measured
    assert cheaper_choice(work, compute(count=1), 3.8) is None
    assert cheaper_choice(work, compute(instance_type="ml.g6e.xlarge"), 2.0) is None  # price not known
    fast = dataclasses.replace(work, parameters=1000)  # nothing to exchange: one host saves next to nothing
    assert cheaper_choice(dataclasses.replace(fast, train_images=100_000), compute(), 200.0) is None


@pytest.mark.parametrize("name", ["ml.g4dn.12xlarge", "ml.g6e.xlarge", "ml.p4d.24xlarge", "ml.p5.48xlarge"])
def test_types_without_a_known_price_have_a_plan_that_says_so(name):
    chosen = compute(instance_type=name)
    hours = estimate_hours(WORK, chosen)
    plain = {"max_run_hours": None, "max_cost": None, "spot": False, "max_wait_hours": None}
    limits = choose_limits(hours, chosen, **plain)
    table = Plan(chosen, WORK, hours, limits, False, "i", {}).table()
    assert table.count("price unknown without an account") == 3 and "$" not in table
    with pytest.raises(Problem, match="--max-cost cannot be kept"):
        choose_limits(hours, chosen, **{**plain, "max_cost": 5.0})


def test_a_gpu_that_the_table_lacks_is_estimated_as_well():
    other = Compute("ml.p9.large", 1, Instance(1, "B900", 80, 64, 10, 9.0))
    assert estimate_hours(WORK, other)[1] > 0
    assert "B900" in Plan(other, WORK, (1.0, 2.0, 3.0), limits(), True, "i", {}).table()


DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "sagemaker.md").read_text(encoding="utf-8")
POLICIES = [(DOCS / "iam" / f"{name}.json").read_text(encoding="utf-8") for name in ("trust", "job-role", "launch")]
ROWS = {
    "1 x `ml.g5.2xlarge`": ("ml.g5.2xlarge", 1),
    "2 x `ml.g5.2xlarge`": ("ml.g5.2xlarge", 2),
    "1 x `ml.g5.12xlarge`": ("ml.g5.12xlarge", 1),
    "2 x `ml.g6.2xlarge`": ("ml.g6.2xlarge", 2),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_the_docs_is_what_the_estimate_says(row):
    """R50 4-scale, 800 x 1067: 0.4594 teraflop forward, 46.6 million trainable parameters, as `forward_cost` counts."""
    work = Work(1000, 100, Length(50), 2, 0.4594, 46_601_482)
    type_name, count = ROWS[row]
    chosen = compute(instance_type=type_name, count=count)
    best, likely, worst = estimate_hours(work, chosen)
    dollars = [about(hours * chosen.price).removeprefix("$") for hours in (likely, best, worst)]
    expected = (
        f"| {chosen.price:.2f} | {likely:.1f} ({best:.1f} to {worst:.1f}) "
        f"| {dollars[0]} ({dollars[1]} to {dollars[2]}) |"
    )
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row}")]
    assert line.endswith(expected), expected


def test_the_policies_of_the_docs_are_valid_and_allow_what_is_called():
    trust, job, user = map(json.loads, POLICIES)
    assert trust["Statement"][0]["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    allowed = [
        {
            action
            for s in policy["Statement"]
            for action in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])
        }
        for policy in (job, user)
    ]
    assert {"s3:GetObject", "s3:PutObject", "s3:ListBucket", "ecr:BatchGetImage"} <= allowed[0]
    needed = set()
    for path in Path(plan.__file__).parent.glob("*.py"):
        needed |= set(re.findall(r"\b((?:sagemaker|iam|s3|logs|servicequotas|ecr):[A-Z]\w+)", path.read_text()))
    assert {"sagemaker:CreateTrainingJob", "s3:PutObject", "logs:GetLogEvents"} <= needed
    assert needed <= allowed[1]


def test_iam_takes_the_policies_and_launch_the_role(aws):
    """As the commands of the page give them, with the account's number and a region in them."""
    trust, job, user = (policy.replace("ACCOUNT", "123456789012").replace("REGION", "us-east-1") for policy in POLICIES)
    assert not re.search(r"[A-Z]{6}", trust + job + user)
    iam = aws("iam")
    iam.create_role(RoleName="dino-trainer", AssumeRolePolicyDocument=trust)
    iam.put_role_policy(RoleName="dino-trainer", PolicyName="dino-trainer", PolicyDocument=job)
    iam.create_user(UserName="me")
    arn = iam.create_policy(PolicyName="dino-launch", PolicyDocument=user)["Policy"]["Arn"]
    assert arn == "arn:aws:iam::123456789012:policy/dino-launch"
    iam.attach_user_policy(UserName="me", PolicyArn=arn)
    assert len("".join(user.split())) <= 6144  # what IAM allows for a policy of its own
    assert resolve_role(Account(), "dino-trainer")[0].endswith(":role/dino-trainer")
