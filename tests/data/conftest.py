from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.data.small_coco import write_split


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A dataset of six training and three validation images."""
    write_split(tmp_path / "train.json", tmp_path / "images", count=6)
    write_split(tmp_path / "val.json", tmp_path / "images", count=3, first_id=101)
    return tmp_path


@pytest.fixture
def lightning_log(caplog):
    """What is said through Lightning's logger, which does not propagate to pytest's handler by itself."""
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
