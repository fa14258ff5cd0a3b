"""The command line: a thin LightningCLI with fixed classes, a folder for each run and errors in one sentence."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from dino_lightning.callbacks import (
    AtomicCheckpointIO,
    GracefulCheckpoint,
    LearningCurves,
    SavedConfig,
)
from dino_lightning.callbacks.rank_watchdog import hold_back_ctrl_c_in_new_processes
from dino_lightning.cli import run_folder
from dino_lightning.cli.arguments import (
    DEFAULT_SEED,
    explain_argument_error,
    refuse_redacted_addresses,
)
from dino_lightning.cli.command import PROGRAM, Terminated, expected_errors
from dino_lightning.cli.config_files import with_packaged_configs
from dino_lightning.cli.final_evaluation import evaluate_with_views
from dino_lightning.cli.introduction import introduce, load_weights, nothing_left
from dino_lightning.cli.option_checks import check_options
from dino_lightning.cli.options_of_weights import with_options_of_weights
from dino_lightning.cli.own_loggers import all_loggers
from dino_lightning.cli.plain_options import ONLY_ON_COMMAND_LINE
from dino_lightning.cli.results import metrics_table, save_report, show_classes, show_places
from dino_lightning.cli.run_options import (
    add_own_options,
    as_list,
    check_metrics,
    ddp_strategy,
    run_callbacks,
)
from dino_lightning.cli.stored_options import FROM_DATA, options_text, other_sizes
from dino_lightning.cli.user_optimizer import use_own_optimizer
from dino_lightning.console import say, without_secrets
from dino_lightning.data import CocoDataModule
from dino_lightning.errors import CheckpointError, DataError, UsageError
from dino_lightning.losses.assignment import check_solver, missing_for
from dino_lightning.report import dominating_error, find_report, load_report
from dino_lightning.training.compilation import check_graphs_of
from dino_lightning.training.module import DINOModule
from dino_lightning.training.precision import settled_precision, uses_cuda
from dino_lightning.training.resume import changed_options

NO_GPU = (
    "PyTorch finds no GPU here, and trainer.accelerator is gpu: add --trainer.accelerator cpu --trainer.devices 1 "
    "(slow with a ResNet-50), or train --config small_cpu.yaml, which is made for CPUs. On a machine with a GPU, "
    "compare its driver with the CUDA of the installed PyTorch."
)


class Commands(LightningCLI):
    """`fit`, `validate` and `test` for `DINOModule` on `CocoDataModule`; users make theirs of `DINOCLI`."""

    classes: tuple[type[DINOModule], type[CocoDataModule]] = (DINOModule, CocoDataModule)
    options: Mapping[str, Any] = {}  # of `LightningCLI`
    program = PROGRAM  # what runs this, for the lines that say how to continue

    def __init__(
        self,
        args: Sequence[str],
        run_dir: Path,
        callbacks: Sequence[Callback] = (),
        stop_flag: Path | None = None,
        held: ExitStack | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.held = held  # what keeps the folder for this run alone
        self.stop_flag = stop_flag
        self.extra_callbacks = list(callbacks)
        self.report = LearningCurves(directory=str(run_dir))
        self._other_run: tuple[str, dict[str, Any]] | None = None
        usual: dict[str, Any] = {
            "save_config_callback": SavedConfig,
            "save_config_kwargs": {"folder": run_dir},
            "seed_everything_default": DEFAULT_SEED,
            "parser_kwargs": {"exit_on_error": False},
        }
        super().__init__(*self.classes, args=list(args), **{**usual, **self.options})

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        """Without abbreviations: one would change its meaning when an option is added."""
        return super().init_parser(**{"allow_abbrev": False, **options})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer methods on offer."""
        return {name: methods for name, methods in LightningCLI.subcommands().items() if name != "predict"}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """This program's own options first, then data, model and Trainer: the order of `--help all`."""
        add_own_options(parser)
        parser.add_lightning_class_args(self._datamodule_class, "data")
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        for name in FROM_DATA:  # each value is stated once: classes and sizes come from the data
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse `args` without the warning about `sys.argv`, which must stay as it is for DDP's other processes."""
        assert isinstance(args, list)
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ArgumentError(None, explain_argument_error(str(error))) from error
        for name in ONLY_ON_COMMAND_LINE:
            if self._given[name]:
                raise ArgumentError(
                    None, f"{name} is an option of the command line (--{name}), not of a configuration."
                )
        check_options(self._given)

    @property
    def _given(self) -> Any:
        """The options as parsed: of the subcommand, or without one all there are."""
        return self.config[self.config.subcommand] if "subcommand" in self.config else self.config

    def _add_instantiators(self) -> None:
        """Keep the stored hyperparameters plain (Lightning would add the names of its own helpers to them)."""

    def _add_configure_optimizers_method_to_model(self, subcommand: str | None) -> None:
        """Give the user's optimizer our parameter groups and schedule; Lightning would take both away."""
        own = type(self).configure_optimizers is not LightningCLI.configure_optimizers
        if own or type(self.model).configure_optimizers is not DINOModule.configure_optimizers:
            super()._add_configure_optimizers_method_to_model(subcommand)
        elif isinstance(self.model, DINOModule):
            optimizer, lr_scheduler = (self._get(self.config_init, name) for name in ("optimizer", "lr_scheduler"))
            use_own_optimizer(self.model, optimizer, lr_scheduler, self.configure_optimizers)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Without Lightning's own table of results, as ours follows it, and with a usage of one line."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"{self.program} {subcommand} [options]"
        if subcommand != "fit":
            parser.set_defaults(verbose=False)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Keep the user's values: Lightning would overwrite them with those stored in the checkpoint."""

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; values they refuse are the user's, not a crash."""
        try:
            super().instantiate_classes()
        except (DataError, CheckpointError):
            raise
        except MisconfigurationException as error:
            if "No supported gpu backend" in str(error):
                raise UsageError(NO_GPU) from error
            raise
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error

    def before_instantiate_classes(self) -> None:
        """Ask again for addresses that were stored without their secrets; settle what the device decides."""
        refuse_redacted_addresses(self._given.as_dict())
        trainer = self._given.trainer
        solver = self._given.get("model.matching_solver")
        device_type = "cuda" if uses_cuda(trainer.accelerator) else "cpu"
        if self.subcommand in ("fit", None):
            check_solver(solver, device_type)
            check_graphs_of(self._given, device_type)
        elif trouble := missing_for(solver, device_type):  # of the training, on another machine
            self._given["model.matching_solver"] = "scipy"
            say(f"matching_solver device is scipy here, for the losses of the evaluation: {trouble}.")
        trainer.precision = settled_precision(trainer.precision, trainer.accelerator)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Any:
        """The Trainer with this run's loggers, checkpoints and pictures, unless the user has others."""
        options, fitting = self._given, self.subcommand in ("fit", None)
        if self.held is not None and not fitting:
            self.run_dir = run_folder.hold_evaluation(self.run_dir, options.as_dict(), self.held)
        self.save_config_kwargs["folder"] = self.run_dir
        check_metrics(options, getattr(self.datamodule, "class_names", ()))
        self.report.best_by = options.best_by
        if config.get("strategy") == "ddp":
            config["strategy"] = ddp_strategy(self.model, compress_gradients=options.compress_gradients)
        config["logger"] = all_loggers(self.run_dir, config.get("logger"), options, fitting=fitting)
        config["plugins"] = [*as_list(config.get("plugins")), AtomicCheckpointIO()]
        config["default_root_dir"] = config.get("default_root_dir") or str(self.run_dir)
        if config.get("enable_model_summary") is None:
            config["enable_model_summary"] = False  # `parameter_line` says it in one line
        own = run_callbacks(
            config,
            options,
            self.run_dir,
            fitting=fitting,
            resuming=self._resuming(),
            stop_flag=self.stop_flag,
            given=callbacks,
            extra=self.extra_callbacks,
            report=self.report,
        )
        trainer = super()._instantiate_trainer(config, own)
        hold_back_ctrl_c_in_new_processes(trainer)
        return trainer

    def _resuming(self) -> bool:
        """Whether the run in this folder is continued."""
        return run_folder.resumes_in(self.run_dir, self._given.get("ckpt_path"))

    def before_fit(self) -> None:
        """Print the dataset and, of a resumed run, the options that changed since its checkpoint."""
        if self.held is not None and not self._resuming():
            run_folder.clear(self.run_dir)  # not earlier: the options are parsed, and the dataset is read
        assert isinstance(self.model, DINOModule) and isinstance(self.datamodule, CocoDataModule)
        introduce(self.model, self.datamodule, self.trainer)
        if self.config.fit.ckpt_path is not None:
            self.model.has_weights = True  # the Trainer tells so only after the module is set up
            before = options_of(Path(self.config.fit.ckpt_path))
            changes = [] if before is None else changed_options(before, without_secrets(self.config.fit.as_dict()))
            if changes:
                say("Changed since the checkpoint was written:\n  " + "\n  ".join(changes) + "\n")

    def after_fit(self) -> None:
        """Show what came out and where it is."""
        assert isinstance(self.model, DINOModule)
        say(f"\n{self.report.table()}\n")
        if not self.report.trained and (sentence := nothing_left(self.trainer)) is not None:
            say(f"{sentence}\n")
        if self.model.evaluation is not None:
            errors = dominating_error(
                self.model.evaluation,
                threshold=self.model.score_threshold,
                nms_iou_threshold=self.model.hparams["nms_iou_threshold"],
                image_size=self.datamodule.image_size,
                fixed_size=None if self.datamodule.pad_to is None else self.datamodule.pad_to[0],
            )
            say(f"Last epoch: {errors}\n")
        if not self._asked_to_stop():
            best = self.run_dir / "checkpoints" / "best.ckpt"
            if (sentence := evaluate_with_views(self.trainer, self.model, self.datamodule, best)) is not None:
                say(f"{sentence}\n")
        show_places(self.run_dir, self.report.curves_path, self.program)
        if self.stop_flag is None and os.environ.get("LOCAL_RANK", "0") == "0":
            self._end_if_interrupted()

    def _end_if_interrupted(self) -> None:
        """A signal that came too late to stop the training ends the command all the same: what follows must not run."""
        if asked_by := self._asked_to_stop():
            kind = KeyboardInterrupt if asked_by == signal.SIGINT else Terminated
            raise kind("Interrupted after the end of the training; all its results are there.")

    def _asked_to_stop(self) -> int:
        """The signal that asked this process to stop; 0 if none has."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]  # set by Lightning, not declared
        return max((each.asked_by for each in callbacks if isinstance(each, GracefulCheckpoint)), default=0)

    def before_validate(self) -> None:
        """Load weights that are not a checkpoint of ours, and read what to compare with before it takes hours."""
        options = self._given
        assert isinstance(self.model, DINOModule) and isinstance(self.datamodule, CocoDataModule)
        if options.ckpt_path is None:
            load_weights(self.model, self.datamodule)
        if (sentence := other_sizes(options.ckpt_path, options.model.weights, self.datamodule)) is not None:
            say(f"{sentence}\n")
        if options.against is None:
            return
        if not options.report:
            raise UsageError("--against compares in the report; leave out --report false.")
        path = find_report(Path(options.against), self.config.subcommand)
        self._other_run = (str(path), load_report(path))

    def before_test(self) -> None:
        """As before validation."""
        self.before_validate()

    def after_validate(self) -> None:
        """Show the metrics, the classes one by one, and write the report."""
        assert isinstance(self.model, DINOModule) and isinstance(self.datamodule, CocoDataModule)
        say(f"\n{metrics_table(self.trainer.callback_metrics)}\n")
        show_classes(self.model.class_results)
        subcommand = self.config.subcommand
        if self.config[subcommand].report:
            checkpoint = str(self.config[subcommand].ckpt_path or "")
            save_report(self.model, self.datamodule, subcommand, checkpoint, self.run_dir, against=self._other_run)

    def after_test(self) -> None:
        """As after validation."""
        self.after_validate()


class _ParseOnly(Commands):
    """Parses and checks a command line, and starts nothing."""

    def _set_seed(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        """Nothing is instantiated."""

    def instantiate_classes(self) -> None:
        """Nothing is instantiated."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parse_fit(args: Sequence[str]) -> dict[str, Any]:
    """The options of `fit` as `fit` itself would understand them, in groups `data`, `model` and `trainer`.

    Raises:
        ArgumentError: an option or a configuration file that does not parse; the message is one sentence.
    """
    parsed: dict[str, Any] = parsed_options(args).as_dict()
    return parsed


def parsed_options(args: Sequence[str]) -> Any:
    """The same as the parser's namespace, which the callbacks of `fit` are made from."""
    given = with_options_of_weights(with_packaged_configs(run_folder.take_overwrite(args)[1]))
    return _ParseOnly(["fit", *given], Path()).config.fit


def options_of(checkpoint: Path) -> dict[str, Any] | None:
    """The options of the run that a checkpoint is from; None where it has none, or those of another version."""
    text = options_text(checkpoint)
    try:
        return None if text is None else parse_fit(["--config", text])
    except expected_errors():
        return None
