"""The deterministic weights and images behind the golden files (see tests/golden/README.md)."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_lightning.model import DINO
from dino_lightning.weights.published_layout import to_published_key

GOLDEN = Path(__file__).parent / "golden"
TINY = {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_queries": 50, "num_classes": 3}


def golden_arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / name) as arrays:
        return {key: torch.from_numpy(value) for key, value in arrays.items()}


def golden_json(name: str):
    return json.loads((GOLDEN / name).read_text())


def seed_key(published_key: str) -> str:
    return re.sub(r"^(transformer\.decoder\.)?(bbox_embed|class_embed)\.\d+\.", r"\2.0.", published_key)


def recipe_tensor(key: str, shape: tuple[int, ...], salt: int = 0) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"dino-golden:{salt}:{key}".encode())))
    z = generator.standard_normal(shape, dtype=np.float32)
    f = np.float32
    if key.endswith("running_var"):
        value = f(1) + f(0.1) * np.abs(z)
    elif key.endswith("running_mean"):
        value = f(0.1) * z
    elif key.endswith("sampling_offsets.bias"):
        value = f(2) * z
    elif "class_embed" in key and key.endswith(".bias"):
        value = f(-2) + f(0.1) * z
    elif key.endswith("bn3.weight"):
        value = f(0.3) + f(0.03) * z
    elif len(shape) == 1:
        value = f(1) + f(0.1) * z if key.endswith("weight") else f(0.05) * z
    elif key == "transformer.level_embed":
        value = f(0.5) * z
    elif key in ("transformer.tgt_embed.weight", "label_enc.weight"):
        value = z
    else:
        fan_in = int(np.prod(shape[1:]))
        if key.endswith("in_proj_weight") or "class_embed" in key:
            gain = 2.0
        elif "bbox_embed" in key and key.endswith("layers.2.weight"):
            gain = 0.5
        elif len(shape) == 4 and key.startswith("backbone."):
            gain = 1.4
        else:
            gain = 1.0
        value = f(gain / np.sqrt(fan_in)) * z
    return torch.from_numpy(np.ascontiguousarray(value))


def load_recipe(model: DINO, salts: Mapping[str, int]) -> DINO:
    """Fill every floating point entry of the model from the recipe."""
    state = {}
    for key, value in model.state_dict().items():
        published = seed_key(to_published_key(key).format(layer=0))
        state[key] = recipe_tensor(published, tuple(value.shape), salts.get(published, 0))
    model.load_state_dict(state)
    return model


def recipe_image(name: str, height: int, width: int) -> Tensor:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"image:{name}:{height}x{width}".encode())))
    low = generator.standard_normal((3, height // 16, width // 16), dtype=np.float32)
    high = generator.standard_normal((3, height, width), dtype=np.float32)
    return torch.from_numpy(low.repeat(16, axis=1).repeat(16, axis=2) + np.float32(0.3) * high)
