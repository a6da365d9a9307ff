"""Shared by the tests: one thread, so that results are the same on every machine with the same torch."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
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


@pytest.fixture
def fault(record_property) -> Callable[[str, int, str], None]:
    """Note for docs/faults.md what was tried, how often, and what came of it; called when it has come of it."""

    def note(what: str, times: int, outcome: str) -> None:
        record_property("fault", json.dumps([what, times, outcome]))

    return note


@pytest.fixture(scope="module")
def whole_project(tmp_path_factory) -> Path:
    """A copy of the project without results, with this environment."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("notebooks", "params", "lib"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / "results").mkdir()
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run make at smoke with the environment that runs the tests, whatever its files' times."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "--old-file=.venv/.ready", "PRESET=smoke", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
