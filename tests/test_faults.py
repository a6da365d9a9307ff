"""Nothing is lost: killed at any moment, at every step of a write, stopped by a signal, two at once, no room on the disk.

A shorter form runs with the other tests; `make test-faults` runs all of it.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from alphaprune.experiment import Experiment

WHOLE = bool(os.environ.get("ALPHAPRUNE_FAULTS"))
WALL_CLOCK = re.compile(r'"(seconds|start_seconds)": [\d.]+')


def small(project: Path, epochs: int = 2, stages: int = 3) -> None:
    """Smoke's fig4 in a few stages, and a pretrained network."""
    smoke = project / "params" / "smoke"
    for name in ("pretrain", "fig4"):
        content = yaml.safe_load((smoke / f"{name}.yaml").read_text()) | {"max_epochs": epochs}
        if name == "fig4":
            content |= {
                "stages": [{"schedule": "listed", "by": [0.9, 0.5, 0.0][:stages], "lr": 0.01, "from": "base"}]
            }
        (smoke / f"{name}.yaml").write_text(yaml.safe_dump(content))  # fmt: skip
    Experiment("smoke", "pretrain", project).run(lambda line: None)


def command(project: Path) -> list[str]:
    return [sys.executable, "-m", "alphaprune.experiment", str(project / "params/smoke/fig4.yaml")]


def start(project: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(project), cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def contents(project: Path) -> dict[str, str]:
    """Of every file of the experiment's results its digest, wall-clock fields aside."""
    found = {}
    for path in sorted((project / "results/smoke/stages/fig4").rglob("*")):
        if path.is_file() and path.name != ".lock":
            text = WALL_CLOCK.sub("", path.read_bytes().decode("latin-1"))
            found[str(path.relative_to(project))] = hashlib.sha256(text.encode("latin-1")).hexdigest()
    return found


@pytest.fixture
def twins(project, tmp_path_factory):
    """A project that ran undisturbed, and its like that has not begun."""
    small(project)
    other = tmp_path_factory.mktemp("other") / "project"
    shutil.copytree(project, other)
    Experiment("smoke", "fig4", other).run(lambda line: None)
    return other, project


def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(twins):
    undisturbed, project = twins
    chance = random.Random(0)
    for _ in range(25 if WHOLE else 3):
        run = start(project)
        time.sleep(chance.uniform(2.5, 6))  # the imports alone take some two seconds
        run.kill()
        run.communicate()
    assert subprocess.run(command(project), cwd=project, capture_output=True).returncode == 0
    assert contents(project) == contents(undisturbed)


def run_until(step: int, project: Path) -> int:
    """Run the experiment in a process that dies at the n-th step of writing files; its exit code, 0 if it got through."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [step]

    def dies(call):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    try:
        os.fsync, os.replace, os.open = dies(os.fsync), dies(os.replace), dies(os.open)
        Experiment("smoke", "fig4", project).run(lambda line: None)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_every_step_of_a_write(project, tmp_path_factory):
    small(project, epochs=1, stages=1)
    undisturbed = tmp_path_factory.mktemp("other") / "project"
    shutil.copytree(project, undisturbed)
    Experiment("smoke", "fig4", undisturbed).run(lambda line: None)
    expected = contents(undisturbed)
    step, died = 0, 0
    while True:
        step += 1 if WHOLE else 7
        shutil.rmtree(project / "results/smoke/stages/fig4", ignore_errors=True)
        code = run_until(step, project)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        died += 1
        Experiment("smoke", "fig4", project).run(lambda line: None)
        assert contents(project) == expected, step
    assert died >= (20 if WHOLE else 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_one_line_and_it_goes_on(twins, number):
    undisturbed, project = twins
    run = start(project)
    lines = []
    for line in run.stdout:
        lines.append(line)
        if "epoch 1/2" in line:
            run.send_signal(number)
            break
    _, errors = run.communicate()
    assert run.returncode == 128 + number
    assert len(errors.splitlines()) == 1 and "the same command goes on from there" in errors
    assert f"stopped by {signal.Signals(number).name}; stage fig4/a0.9-lr0.01 is saved" in errors
    assert subprocess.run(command(project), cwd=project, capture_output=True).returncode == 0
    assert contents(project) == contents(undisturbed)


def test_two_at_once_train_no_stage_twice(twins):
    undisturbed, project = twins
    both = [start(project), start(project)]
    said = [run.communicate() for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    ended = [line for out, _ in said for line in out.splitlines() if ": best " in line]
    assert len(ended) == 3  # one a stage
    assert any(re.search(r"is being trained by process \d+ on \S+; waiting", out) for out, _ in said)
    assert contents(project) == contents(undisturbed)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_what_was_there_stays(twins):
    undisturbed, project = twins
    stages = project / "results/smoke/stages/fig4"
    stages.mkdir()
    # A stage's two states hold its weights three times each; so the first fits, and not the second beside it.
    weights = next((undisturbed / "results/smoke/stages/fig4").glob("*/weights.safetensors")).stat().st_size
    size = f"size={round(7.6 * weights)}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(stages)])
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        done = subprocess.run(command(project), cwd=project, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
        assert "cannot be written (No space left on device)" in done.stderr
        recorded = {path: path.read_bytes() for path in stages.glob("*/run.json")}
        assert recorded  # the first stage found room
        assert subprocess.run(["mount", "-o", "remount,size=80m", str(stages)]).returncode == 0
        assert subprocess.run(command(project), cwd=project, capture_output=True).returncode == 0
        assert contents(project) == contents(undisturbed)
        assert all(path.read_bytes() == before for path, before in recorded.items())
    finally:
        subprocess.run(["umount", str(stages)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_results_that_cannot_be_written_are_named(twins):
    _, project = twins
    (project / "results/smoke").chmod(0o555)
    done = subprocess.run(command(project), cwd=project, capture_output=True, text=True)
    (project / "results/smoke").chmod(0o755)
    assert done.returncode == 2 and "cannot be written (Permission denied)" in done.stderr


def test_a_notebook_passes_the_signal_on_and_nothing_half_made_is_left(project):
    small(project, epochs=3)
    out = project / "results/smoke/notebooks/fig4.ipynb"
    notebook, file = ROOT / "notebooks/02_alpha_decay.ipynb", project / "params/smoke/fig4.yaml"
    line = [sys.executable, str(ROOT / "notebooks/execute.py"), str(notebook), str(out), "-f", str(file)]
    run = subprocess.Popen(line, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for said in run.stdout:
        if "epoch 1/3" in said:
            run.send_signal(signal.SIGTERM)
            break
    _, errors = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM
    stopped = [x for x in errors.splitlines() if x.startswith("alphaprune:")]
    assert len(stopped) == 1 and "fig4/a0.9-lr0.01 is saved after" in stopped[0]
    assert [p.name for p in out.parent.iterdir()] == []
    assert subprocess.run(line, cwd=project, capture_output=True).returncode == 0
    assert [p.name for p in out.parent.iterdir()] == ["fig4.ipynb"]
