"""Where a result came from: commit, versions, hardware. Recorded, never part of an identity."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def provenance(root: Path) -> dict[str, Any]:
    """Commit, versions, hardware and command of this process, for a record."""
    git = shutil.which("git") and subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": (git and git.stdout.strip()) or None,
        "versions": {name: version(name) for name in ("torch", "torchvision", "accelerate")}
        | {"python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "gpu": gpu, "threads": torch.get_num_threads()},
    }
