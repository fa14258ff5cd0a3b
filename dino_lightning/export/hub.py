"""A model directory on the Hugging Face Hub, with a card that says what is in it and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dino_lightning.errors import CheckpointError
from dino_lightning.export.model_directory import DESCRIPTION_FILE, MODEL_FILE
from dino_lightning.weights.download import HUB_SCHEME, hub_endpoint

CARD = "README.md"
PICTURES = {"detections.png": "Detections on validation images", "learning_curves.png": "Learning curves"}
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def repository_of(place: str) -> str:
    """hf://OWNER/REPO -> OWNER/REPO.

    Raises:
        CheckpointError: it has another form.
    """
    name = place.removeprefix(HUB_SCHEME).rstrip("/")
    if not _NAME.fullmatch(name):
        raise CheckpointError(f"{place}: to write to the Hugging Face Hub give hf://OWNER/REPO.")
    return name


def push(folder: Path, repository: str, overwrite: bool) -> str:
    """Upload a model directory; the repository is made, as a private one, if there is none. Returns its address.

    The token is that of `hf auth login`, or of the environment variable HF_TOKEN.

    Raises:
        CheckpointError: no huggingface_hub, no permission, no network, or a repository that has a model already.
    """
    try:
        from huggingface_hub import HfApi, errors
    except ImportError as error:
        raise CheckpointError(
            "Writing to the Hugging Face Hub needs the package huggingface_hub: pip install 'dino-lightning[hub]', or "
            "pip install huggingface_hub."
        ) from error
    (folder / CARD).write_text(card(json.loads((folder / DESCRIPTION_FILE).read_text()), repository, folder))
    api = HfApi(endpoint=hub_endpoint())
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        if not overwrite and api.file_exists(repository, MODEL_FILE):
            raise CheckpointError(f"{HUB_SCHEME}{repository} has a model already; give --overwrite to replace it.")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A detector of dino_lightning")
    except CheckpointError:
        raise
    except Exception as error:  # of the hub's client and of the HTTP library that it uses
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)
        hint = " Log in with `hf auth login`, or set HF_TOKEN to a token that may write there." if refused else ""
        reason = " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())
        raise CheckpointError(f"{HUB_SCHEME}{repository} cannot be written ({reason}).{hint}") from error
    return f"{hub_endpoint()}/{repository}"


def card(description: Mapping[str, Any], repository: str, folder: Path) -> str:
    """The card of a model, as Markdown with the hub's metadata before it.

    Args:
        description: what `model_directory.describe` says of the model.
        repository: OWNER/REPO.
        folder: the model directory, for its pictures.
    """
    names = [entry["name"] for entry in description["classes"]]
    prepared = description["preprocessing"]
    stretched = prepared["stretched_to_a_square_of"]
    size = (
        f"stretched to {stretched} x {stretched} pixels"
        if stretched
        else f"resized to a short side of {prepared['short_side']} pixels and at most {prepared['long_side_at_most']}"
    )
    metrics = {name.removeprefix("val/"): value for name, value in description["metrics"].items()}
    shown = [name for name in ("AP", "AP50", "AP75", "F1", "F1_precision", "F1_recall") if name in metrics]
    lines = [
        "---",
        "library_name: dino_lightning",
        "pipeline_tag: object-detection",
        "tags: [object-detection, dino, detr]",
        "---",
        f"# {repository.partition('/')[2]}",
        "",
        "An object detector of the kind DINO (DETR with Improved deNoising anchOr boxes, arXiv 2203.03605), trained",
        f"with dino_lightning. It finds {_classes(names)}.",
        "",
        "## Use",
        "",
        "```python",
        "from dino_lightning import load_detector",
        "",
        f'detections = load_detector("{HUB_SCHEME}{repository}")("image.png")',
        "```",
        "",
        f"Images are RGB, {size}; this and the normalisation happen inside. Boxes are in pixels of the image as it is.",
        "",
        "## Metrics",
        "",
    ]
    if shown:
        lines += [f"Of the validation images, after {description['epoch']} epochs (IoU of F1: 0.5):", ""]
        lines += [f"| {' | '.join(shown)} |", f"|{'---|' * len(shown)}"]
        lines += [f"| {' | '.join(f'{metrics[name]:.3f}' for name in shown)} |", ""]
        lines += [f"Scores from {description['score_threshold']:.3f} on give the best F1 and count as found.", ""]
    else:
        lines += ["None are known: the weights come from a file without a run beside it.", ""]
    for file, title in PICTURES.items():
        if (folder / file).is_file():
            lines += [f"![{title}]({file})", ""]
    if len(names) > 1:
        lines += ["## Classes", "", "| label | category id | name |", "|---|---|---|"]
        lines += [
            f"| {entry['label']} | {entry['category_id']} | {_plain(entry['name'])} |"
            for entry in description["classes"]
        ]
    return "\n".join(lines).rstrip() + "\n"


def _classes(names: list[str]) -> str:
    if len(names) == 1:
        return f"objects of one class, {_plain(names[0])}"
    return f"objects of {len(names)} classes" if names else "objects"


def _plain(name: str) -> str:
    """A class's name, without what Markdown would take for marks of its own."""
    return re.sub(r"([\\|`*_\[\]<>#])", r"\\\1", " ".join(str(name).split()))
