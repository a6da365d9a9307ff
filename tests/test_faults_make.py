"""The whole smoke reproduction, killed 25 times at random moments: `make test-faults` runs it, some minutes."""

import hashlib
import os
import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import make

pytestmark = pytest.mark.skipif(not os.environ.get("ALPHAPRUNE_FAULTS"), reason="part of make test-faults")
KILLS = 25
WALL_CLOCK = re.compile(rb'"(seconds|start_seconds)": [\d.]+')


def contents(project: Path) -> dict[str, str]:
    """Digests of all records, weights and figures, wall-clock fields aside."""
    results = project / "results" / "smoke"
    files = [p for part in ("stages", "pretrained", "figures") for p in (results / part).rglob("*")]
    files = [p for p in files if p.is_file() and p.name != ".lock"] + [results / "scorecard.csv"]
    return {
        str(p.relative_to(project)): hashlib.sha256(WALL_CLOCK.sub(b"", p.read_bytes())).hexdigest()
        for p in files
    }


def killed_after(seconds: float, project: Path) -> None:
    """`make reproduce-figures`, killed with everything that it started."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    command = ["make", "--old-file=.venv/.ready", "PRESET=smoke", "reproduce-figures"]
    run = subprocess.Popen(
        command, cwd=project, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    time.sleep(seconds)
    everything = [run, *psutil.Process(run.pid).children(recursive=True)] if run.poll() is None else []
    for process in everything:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    run.wait()


def test_a_reproduction_killed_25_times_gives_the_same_to_the_bit(whole_project, tmp_path):
    other = tmp_path / "undisturbed"
    shutil.copytree(whole_project, other, symlinks=True)
    assert make(other, "reproduce-figures").returncode == 0
    chance = random.Random(1)
    for _ in range(KILLS):
        killed_after(chance.uniform(1, 14), whole_project)
    done = make(whole_project, "reproduce-figures")
    assert done.returncode == 0, done.stderr[-2000:]
    assert contents(whole_project) == contents(other)
