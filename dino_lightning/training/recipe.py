"""The published recipe, and one for short runs; which of them, and its numbers, follow from the number of steps.

The published settings are made for 90,000 steps and more, with 900 queries and 80 classes (arXiv 2203.03605). With one
class and a thousand steps they leave most of what can be learned unused: the norm of the gradients is clipped to a
hundredth of what it is, the focal loss weighs positives down until duplicates score as high as the best box, and the
noise of the denoising boxes teaches more than the steps are enough for. The figures behind the other settings are in
benchmarks/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from dino_lightning.losses import Criterion, HungarianMatcher
from dino_lightning.losses.class_losses import ClassLoss

RecipeName = Literal["published", "short", "auto"]

SHORT_RUN = 10_000  # optimizer steps; below, "auto" is "short"
TOO_FEW_STEPS = 600
MOST_WARMUP_STEPS = 200
LAST_RATE_SHARE = 0.2  # of a short run's epochs are trained with the dropped learning rate
LONGEST_AVERAGE = 0.9997  # decay of the weights' average, as in the published recipes that have one


@dataclass(frozen=True)
class Recipe:
    """The settings that a recipe decides where the user does not.

    Attributes:
        clip_grad_norm: total gradient norm to clip to.
        warmup_steps: optimizer steps of linear warm-up.
        box_noise_scale: how far corners of denoising boxes move, in half box sizes.
        class_loss: the loss of the class scores.
        class_loss_weight: its weight in the sum.
        lr_drop_share: share of the epochs after which the learning rate drops.
    """

    clip_grad_norm: float = 0.1
    warmup_steps: int = 0
    box_noise_scale: float = 1.0
    class_loss: ClassLoss = "focal"
    class_loss_weight: float = 1.0
    lr_drop_share: float = 11 / 12

    def with_choices(self, choices: Mapping[str, Any]) -> Recipe:
        """The same with every value of `choices` that is not None."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        own.update({name: value for name, value in choices.items() if name in own and value is not None})
        return Recipe(**own)


PUBLISHED = Recipe()


def short_recipe(steps: int) -> Recipe:
    """The recipe of a run of so many optimizer steps."""
    return Recipe(
        clip_grad_norm=1.0,
        warmup_steps=min(max(steps // 20, 1), MOST_WARMUP_STEPS),
        box_noise_scale=0.4,
        class_loss="quality_focal",
        class_loss_weight=2.0,
        lr_drop_share=1 - LAST_RATE_SHARE,
    )


def is_short(name: RecipeName, steps: int | None) -> bool:
    """Whether a run follows the recipe for short runs; one of unknown length does so only if told to."""
    return name == "short" or (name == "auto" and steps is not None and steps < SHORT_RUN)


def choose_recipe(name: RecipeName, steps: int | None) -> Recipe:
    """The recipe of that name for a run of so many optimizer steps, None if unknown.

    Raises:
        ValueError: there is no such recipe.
    """
    if name not in ("published", "short", "auto"):
        raise ValueError(f"recipe is {name!r}; choose published, short or auto.")
    return short_recipe(SHORT_RUN if steps is None else steps) if is_short(name, steps) else PUBLISHED


def criterion_of(options: Mapping[str, Any], recipe: Recipe) -> Criterion:
    """The criterion of a `DINOModule` with these options, in a run that follows the recipe."""
    return Criterion(
        matcher=HungarianMatcher(
            **{name: options[name] for name in ("cost_class", "cost_bbox", "cost_giou")},
            kind=options["matching_cost"],
            solver=options["matching_solver"],
        ),
        class_loss=recipe.class_loss,
        weight_class=recipe.class_loss_weight,
        weight_bbox=options["bbox_loss_weight"],
        weight_giou=options["giou_loss_weight"],
    )


def average_decay(steps: int | None) -> tuple[float, float]:
    """Decay and tau (in steps) of a weights' average that reaches back over a fifth of the run."""
    if steps is None:
        return LONGEST_AVERAGE, 2000.0
    reach = max(steps / 5, 2.0)
    return min(1 - 1 / reach, LONGEST_AVERAGE), min(reach, 2000.0)


def describe(name: RecipeName, recipe: Recipe, steps: int) -> str:
    """Which recipe a run follows and what that means, in one line."""
    if not is_short(name, steps):
        hint = "" if steps >= SHORT_RUN else "; --model.recipe auto suits so few steps better"
        return f"Recipe: published, as for long runs{hint}."
    why = f"fewer than {SHORT_RUN:,} steps" if name == "auto" else "as asked for"
    return (
        f"Recipe: short ({why}): {recipe.class_loss} of weight {recipe.class_loss_weight:g}, gradients clipped to "
        f"{recipe.clip_grad_norm:g}, {recipe.warmup_steps} warm-up steps, box noise {recipe.box_noise_scale:g}."
    )


def warn_of_other_recipe(name: RecipeName, before: int | None, now: int | None) -> None:
    """Say if a resumed run that was planned to have `before` steps, None if unknown, had another recipe than now."""
    was, short = is_short(name, before), is_short(name, now)
    if before is not None and was != short:
        words = {True: "short", False: "published"}
        rank_zero_warn(
            f"The run was planned to have {before:,} steps, by the recipe {words[was]}; it goes on by the recipe "
            f"{words[short]}: class loss, gradient clipping, box noise and warm-up change. --model.recipe {words[was]} "
            "keeps them."
        )


def advice_on_few_steps(steps: int, epochs: int | None, *, limited: bool = False) -> str | None:
    """A warning where there are too few steps for either recipe, without weights of a whole detector to start from.

    Args:
        steps: of the run.
        epochs: of the run, None or -1 if only the steps are limited.
        limited: `max_steps` ends it before the epochs do.
    """
    few = f"{steps:,} steps are few for this kind of detector: scores stay low, and boxes are found twice."
    if steps >= TOO_FEW_STEPS:
        return None
    if limited:
        return f"{few} --trainer.max_steps {TOO_FEW_STEPS} or more, with epochs enough for them, suits it better."
    if not epochs or epochs < 1:
        return None
    enough = -(-epochs * TOO_FEW_STEPS // max(steps, 1))
    return f"{few} --trainer.max_epochs {enough} gives {TOO_FEW_STEPS} or more."


def planned_steps(trainer: Any, data: Any) -> int | None:
    """Optimizer steps of a whole run, from its first; None where they cannot be known before the loaders are made.

    Not with `Trainer.estimated_stepping_batches`, which makes the loaders, too early for a resumed run.

    Args:
        trainer: a Lightning Trainer.
        data: a `CocoDataModule`; anything else gives None unless `max_steps` is set.
    """
    epochs, most = trainer.max_epochs, trainer.max_steps
    batches = batches_per_epoch(trainer, data)
    by_epochs = None
    if batches is not None and epochs is not None and epochs > 0:
        by_epochs = -(-batches // trainer.accumulate_grad_batches) * epochs
    given = [steps for steps in (by_epochs, most if most is not None and most > 0 else None) if steps is not None]
    return min(given, default=None)


def reached_epochs(trainer: Any) -> int | None:
    """Epochs that a run has or begins: `max_epochs`, or fewer where `max_steps` ends it before; None if unknown."""
    epochs: int | None = trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None
    batches = batches_per_epoch(trainer, getattr(trainer, "datamodule", None))
    if batches is None or (trainer.max_steps or -1) < 1:
        return epochs
    by_steps: int = -(-trainer.max_steps // -(-batches // trainer.accumulate_grad_batches))
    return by_steps if epochs is None else min(epochs, by_steps)


def batches_per_epoch(trainer: Any, data: Any) -> int | None:
    """Training batches of one process in an epoch, or None where `data` does not say how many images there are."""
    images, batch_size = getattr(data, "images_per_epoch", None), getattr(data, "batch_size", None)
    if images is None or batch_size is None:
        return None
    here = -(-images // trainer.world_size)
    batches = max(here // batch_size, 1)
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else max(int(batches * limit), 1)
