"""Shared by the tests: one thread, so that results are the same on every machine with the same torch."""

import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
torch.set_num_threads(1)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the project's params, and results of its own."""
    shutil.copytree(ROOT / "params", tmp_path / "params")
    (tmp_path / "results").mkdir()
    return tmp_path
