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

pytestmark = pytest.mark.skipif(not os.environ.get("ALPHAPRUNE_FAULTS"), reason="part of make test-faults")
KILLS = 25
# Seconds, and the SHA-256 of a record, which has seconds in it.
WALL_CLOCK = re.compile(rb'"(seconds|start_seconds)": [\d.]+|"record_sha256": "[0-9a-f]{64}"')
COMMAND = ["make", "--old-file=.venv/.ready", "PRESET=smoke", "reproduce-figures"]


def contents(project: Path) -> dict[str, str]:
    """Digests of all records, weights and figures, wall-clock fields aside."""
    results = project / "results" / "smoke"
    files = [p for part in ("stages", "pretrained", "figures") for p in (results / part).rglob("*")]
    files = [p for p in files if p.is_file() and p.name != ".lock"] + [results / "scorecard.csv"]
    return {
        str(p.relative_to(project)): hashlib.sha256(WALL_CLOCK.sub(b"", p.read_bytes())).hexdigest()
        for p in files
    }


def started(project: Path, *more: str, **options) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    return subprocess.Popen([*COMMAND, *more], cwd=project, env=environment, **options)


def undisturbed(project: Path) -> float:
    """Reproduce without being disturbed. Returns the seconds until the first stage was begun: what a machine needs to load."""
    run, begun, first = started(project, stdout=subprocess.PIPE, text=True), time.monotonic(), None
    for line in run.stdout:
        if first is None and "stage 1/" in line:
            first = time.monotonic() - begun
    assert run.wait() == 0
    return first


def killed_after(seconds: float, project: Path) -> bool:
    """`make reproduce-figures`, killed with everything that it started. Returns whether it was still running."""
    run = started(project)
    try:
        run.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        pass
    for process in [run, *psutil.Process(run.pid).children(recursive=True)]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    run.wait()
    return True


def test_a_reproduction_killed_25_times_gives_the_same_to_the_bit(whole_project, tmp_path, fault):
    other = tmp_path / "undisturbed"
    shutil.copytree(whole_project, other, symlinks=True)
    loading = undisturbed(other)
    chance = random.Random(1)
    # In half of the cases something trains by then.
    killed = sum(killed_after(chance.uniform(0.2, 1.8) * loading, whole_project) for _ in range(KILLS))
    assert killed == KILLS
    both = [started(whole_project, "JOBS=4", stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [run.communicate()[1] for run in both]
    assert [run.returncode for run in both] == [0, 0], errors
    assert contents(whole_project) == contents(other)
    same = "records, weights, figures and scorecard are the same, bit for bit"
    fault(
        "`make reproduce-figures` at smoke, killed at a random moment",
        killed,
        f"the same command goes on; {same}",
    )
    fault("the rest of it twice at once, four notebooks each", 1, f"both end; {same}")
