"""The commands that `tests/cli/interrupts.py` interrupts, and the stages of each."""

from dataclasses import dataclass

from dino_lightning.__main__ import COMMANDS
from tests.conftest import TINY_ARGS

END = "exit"  # the command has done its work, and Python ends
START = ("argparse", "lightning.pytorch")  # imports
SAVE, READ = "torch.serialization:_save", "dino_lightning.data.read_files:read_files"
MODULE = "dino_lightning.training.module:"
STEP = MODULE + "DINOModule.training_step"
CHECK = "dino_lightning.training.evaluated_module:EvaluatedModule.validation_step"
LOAD, WRITE = "dino_lightning.weights.reading:read_checkpoint", "dino_lightning.files:atomic_write"


@dataclass(frozen=True)
class Command:
    """A command line, in a folder of its own, and the stages at which it is interrupted.

    Attributes:
        arguments: of `python -m`; `{rooms}`, `{checkpoint}` and `{config}` are filled in.
        stages: `module` (it is imported) or `module:function` (it is called), in the order of time; `program@` before
            it for one of several processes.
        saves: the stages at which it saves a checkpoint, and says how to resume.
        saved: the stages at which it has saved one before, and says how to resume when it is interrupted twice as well.
        served: the stage that Ctrl-C is meant to end: exit code 0, and nothing to be said.
    """

    arguments: tuple[str, ...]
    stages: tuple[str, ...]
    saves: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()
    served: str = ""


def own(*arguments):
    return ("dino_lightning", *arguments)


FIT = (
    *own("fit", "--data.root", "{rooms}", "--run_dir", "run", *TINY_ARGS),
    *("--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--data.batch_size=2"),
)
DDP = ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_epochs=20")
STARTED = "lightning.pytorch.strategies.launchers.subprocess_script:_launch_process_observer"
FIT_STAGES = (READ, MODULE + "DINOModule.__init__", STEP, CHECK, SAVE)
DRAW = ("dino_lightning.callbacks.learning_curves:draw_curves", "dino_lightning.files:save_figure")
CLOSING = "dino_lightning.callbacks.learning_curves:LearningCurves.table"
EVALUATED = ("--ckpt_path", "{checkpoint}", "--run_dir", "out", "--trainer.enable_progress_bar=false")
EVALUATION = (*START, READ, LOAD, CHECK, "dino_lightning.report:write_report", WRITE, END)
LOCAL = ("--config", "{config}", "--data", "{rooms}", "--local", "--local-dir", "ml")
RESULTS, FORMATS = "dino_lightning.inference.results:", "dino_lightning.export.formats:"
DIRECTORY = "dino_lightning.export.model_directory:write_model_directory"
LAPTOP, CONTAINER = "sagemaker_entry.laptop.", "sagemaker_entry.container."
LAUNCH, TRAIN = "sagemaker_entry.launch@", "sagemaker_entry.train@"
SERVE, SERVING = "sagemaker_entry.serve@", "uvicorn.server:Server.main_loop"
TORCHRUN, WORKER = CONTAINER + "torchrun@", CONTAINER + "worker@"
LAUNCHED = (START[0], LAPTOP + "training_config:check_training")
MATRIX = {
    "fit": Command(
        (*FIT, "--trainer.num_sanity_val_steps=0", "--save_every_steps=1"),
        (*START, "torch", *FIT_STAGES, *DRAW, CLOSING, END),
        saves=(STEP, CHECK),
        saved=(CHECK,),
    ),
    "fit, 2 loaders": Command((*FIT, "--data.num_workers=2"), (CHECK, STEP, SAVE), saves=(CHECK, STEP)),
    "fit, 2 processes": Command(
        (*FIT, *DDP, "--trainer.num_sanity_val_steps=0", "--save_every_steps=1"),
        (READ, MODULE + "DINOModule.__init__", STARTED, "torch.distributed:init_process_group", STEP, CHECK, SAVE),
        saves=(STEP, CHECK),
        saved=(CHECK,),
    ),
    "fit, resumed": Command(
        own("fit", "--ckpt_path", "{checkpoint}", "--run_dir", "run", "--trainer.max_epochs=2"),
        (LOAD, STEP, SAVE, END),
        saves=(STEP,),
    ),
    "validate": Command(own("validate", *EVALUATED), EVALUATION),
    "test": Command(
        own("test", *EVALUATED), tuple(stage.replace("validation_step", "test_step") for stage in EVALUATION)
    ),
    "predict": Command(
        own("predict", "--ckpt_path", "{checkpoint}", "--images", "{rooms}/val/images", "--num_workers=1"),
        (*START, LOAD, RESULTS + "record", "dino_lightning.inference.loop:_draw", RESULTS + "write_results",
         RESULTS + "_JsonList.close", END),
    ),
    "export": Command(
        own("export", "--ckpt_path", "{checkpoint}", "--output", "model.onnx"),
        (*START, LOAD, FORMATS + "write_onnx", "onnx:save", FORMATS + "run_onnx", END),
    ),
    "export, program": Command(
        own("export", "--ckpt_path", "{checkpoint}", "--format", "torch", "--output", "model.pt2"),
        (FORMATS + "write_torch", "torch.export:save", END),
    ),
    "export, directory": Command(
        own("export", "--ckpt_path", "{checkpoint}", "--format", "directory", "--output", "model"),
        (LOAD, DIRECTORY, SAVE, END),
    ),
    "convert": Command(
        own("convert", "--weights", "{checkpoint}", "--output", "published.pth"), (*START, LOAD, SAVE, END)
    ),
    "inspect": Command(
        own("inspect", "--data.root", "{rooms}"),
        (*START, READ, "dino_lightning.inspection.image_facts:facts_of_all", "dino_lightning.inspection.page:as_html",
         WRITE, END),
    ),
    "preview": Command(
        own("preview", "--data.root", "{rooms}"),
        (*START, READ, "dino_lightning.visualization.panels:draw_panels", "matplotlib.figure:Figure.savefig", END),
    ),
    "rooms": Command(
        own("rooms", "--root", "plans", "--num_train", "300"),
        (START[0], "numpy", "dino_lightning.floor_plans.dataset:draw_plan", "PIL.Image:Image.save", END),
    ),
    "weights": Command(own("weights", "get", "served"), (START[0], "dino_lightning.weights.transfer:_read", END)),
    "to_coco": Command(
        own("to_coco", "--data.root", "{rooms}", "--output", "copy"),
        (*START, READ, "json:dump", "shutil:copyfileobj", END),
    ),
    "launch --local": Command(
        ("sagemaker_entry.launch", *LOCAL),
        (*LAUNCHED, LAPTOP + "dataset_pack:write_dataset", LAPTOP + "local_run:run_locally", TRAIN + "dataclasses",
         TRAIN + CONTAINER + "stopping", CONTAINER + "environment:read_environment", CONTAINER + "peers:Peers.start",
         CONTAINER + "channels:data_options", TORCHRUN + "torch", TORCHRUN + "torch.distributed.run:main",
         WORKER + "torch", WORKER + MODULE + "DINOModule.__init__", STEP, SAVE, DIRECTORY, TRAIN + END, LAUNCH + END),
        saves=(STEP,),
    ),
    "launch transform --local": Command(
        ("sagemaker_entry.launch", "transform", "{model}", "{rooms}/val/images", "--local",
         "--output", "found"),
        (*LAUNCHED[:1], SERVE + "torch", SERVE + "uvicorn", LAPTOP + "serving_local:_answer",
         LAPTOP + "serving_local:atomic_write", LAUNCH + END),
    ),
    "launch deploy --local": Command(
        ("sagemaker_entry.launch", "deploy", "{model}", "--local", "--port", "0"),
        (*LAUNCHED[:1], SERVE + "json", SERVE + "torch", SERVE + "uvicorn", SERVING),
        served=SERVING,
    ),
    "serve": Command(
        ("sagemaker_entry.serve", "--model", "{model}", "--host", "127.0.0.1", "--port", "0"),
        ("json", "torch", "uvicorn", SERVING),
        served=SERVING,
    ),
    "launch --dry-run": Command(
        ("sagemaker_entry.launch", *LOCAL[:4], "--dry-run"),
        (*LAUNCHED, "boto3", LAPTOP + "start:make_plan", LAPTOP + "start:planned_job", END),
    ),
}  # fmt: skip
assert {name.partition(",")[0] for name in MATRIX if not name.startswith(("launch", "serve"))} == {*COMMANDS}
