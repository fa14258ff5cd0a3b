"""What `fit`, `validate` and `test` do before they begin: say what they work on, load weights without checkpoint."""

from __future__ import annotations

from lightning.pytorch import Trainer

from dino_lightning.console import say
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import UsageError
from dino_lightning.training.initial_weights import detector_weights
from dino_lightning.training.module import DINOModule
from dino_lightning.training.recipe import advice_on_few_steps, choose_recipe, describe, planned_steps
from dino_lightning.weights.loading import load_initial_weights


def introduce(module: DINOModule, data: CocoDataModule, trainer: Trainer) -> None:
    """Print what `fit` trains on and how long, and what of it can hardly be learnt."""
    say(f"{data.summary()}\n\n{data.class_table()}\n")
    say(f"{parameter_line(module)}\n")
    for sentence in data.hazards(module.model.query_selection.content_queries.num_embeddings):
        say(f"{sentence}\n")
    _tell_the_length(module, data, trainer)


def parameter_line(module: DINOModule) -> str:
    """The size of the model in one line, in place of Lightning's table."""
    total = sum(parameter.numel() for parameter in module.model.parameters())
    trainable = sum(parameter.numel() for parameter in module.model.parameters() if parameter.requires_grad)
    return f"DINO: {total / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trainable"


def load_weights(module: DINOModule, data: CocoDataModule) -> None:
    """Load the weights of an evaluation without a checkpoint of ours, and say which they are.

    Raises:
        UsageError: there are none.
        CheckpointError: they cannot be used.
    """
    weights = module.places["weights"]
    if weights is None:
        raise UsageError("There is nothing to evaluate: give a checkpoint with --ckpt_path, or --model.weights.")
    loaded = load_initial_weights(module.model, weights, data.class_names)
    if loaded.score_threshold is not None:
        module.score_threshold = loaded.score_threshold
    say(f"{loaded}\n")


def nothing_left(trainer: Trainer) -> str | None:
    """Why nothing was trained, of a run that was at its end when it was resumed; None if it was not."""
    for name, done, most in (
        ("epoch", trainer.current_epoch, trainer.max_epochs),
        ("step", trainer.global_step, trainer.max_steps),
    ):
        if most is not None and 0 < most <= done:
            return (
                f"Nothing was left to train: {name} {done} of {most} was done already. "
                f"A larger --trainer.max_{name}s goes on."
            )
    return None


def _tell_the_length(module: DINOModule, data: CocoDataModule, trainer: Trainer) -> None:
    """How many steps the run takes, which recipe follows from that, and whether they are too few."""
    steps = planned_steps(trainer, data)
    if steps is None:
        return
    images, epochs = data.images_per_epoch, trainer.max_epochs
    times = f" x {epochs} epochs" if epochs is not None and epochs > 0 and steps != trainer.max_steps else ""
    say(f"{images:,} images{times}: {steps:,} optimizer steps.")
    name = module.hparams["recipe"]
    recipe = choose_recipe(name, steps).with_choices(module.hparams)
    say(describe(name, recipe, steps))
    whole = detector_weights(module.hparams, data.class_names) is not None
    if not whole and (advice := advice_on_few_steps(steps, epochs, limited=steps == trainer.max_steps)) is not None:
        say(advice)
    say("")
