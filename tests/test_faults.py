"""Nothing is lost: killed at any moment, at every step of a write, stopped by a signal, two at once, no room on the disk, no right to write.

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
import tempfile
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from alphaprune.experiment import Experiment

WHOLE = bool(os.environ.get("ALPHAPRUNE_FAULTS"))
# Seconds, and the SHA-256 of a record, which has seconds in it.
WALL_CLOCK = re.compile(r'"(seconds|start_seconds)": [\d.]+|"record_sha256": "[0-9a-f]{64}"')
AS_BEFORE = "the same command goes on and ends with the same files, bit for bit"
NOBODY = 65534


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


def in_a_process(project: Path, before=lambda: None) -> int:
    """Run the experiment in a process of its own, which has all modules loaded already. Returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        before()
        Experiment("smoke", "fig4", project).run(lambda line: None)
        os._exit(0)
    finally:
        os._exit(1)


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(twins, fault):
    undisturbed, project = twins
    before, results = contents(undisturbed), project / "results/smoke/stages/fig4"
    started = time.monotonic()
    assert exit_code(in_a_process(project)) == 0
    whole = time.monotonic() - started  # of a run that nobody disturbs
    chance, kills = random.Random(0), 0
    shutil.rmtree(results)
    while kills < (25 if WHOLE else 3):
        child = in_a_process(project)
        time.sleep(chance.uniform(0, whole / 2))
        os.kill(child, signal.SIGKILL)
        if exit_code(child) == 0:  # it had got through, after so many kills
            assert contents(project) == before
            shutil.rmtree(results)
        else:
            kills += 1
    assert subprocess.run(command(project), cwd=project, capture_output=True).returncode == 0
    assert contents(project) == before
    fault("an experiment killed at a random moment", kills, AS_BEFORE)


def run_until(step: int, project: Path) -> int:
    """Run the experiment in a process that dies at the n-th step of writing files; its exit code, 0 if it got through."""
    left = [step]

    def dies(call):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted

    def arm():
        os.fsync, os.replace, os.open = dies(os.fsync), dies(os.replace), dies(os.open)

    return exit_code(in_a_process(project, arm))


def test_killed_at_every_step_of_a_write(project, tmp_path_factory, fault):
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
    fault(
        "an experiment killed at a step of writing its files" + (", each once" if WHOLE else ""),
        died,
        AS_BEFORE,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_command_with_one_line_and_it_goes_on(twins, number, fault):
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
    fault(f"{signal.Signals(number).name}", 1, f"saved, one line, exit code {128 + number}; {AS_BEFORE}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("line", "loads"),
    [
        (["-m", "alphaprune.experiment", "params/smoke/fig4.yaml", "--why"], b"pandas"),
        (["-m", "alphaprune.comparison", "controls", "smoke", "--why"], b"pandas"),
        (["-m", "alphaprune.data"], b"libtorch_cpu"),
        (["notebooks/execute.py", "notebooks/01_pretraining.ipynb", "{out}"], b"_psutil"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_signal_while_a_command_loads_is_one_line_too(tmp_path, number, line, loads):
    line = [part.format(out=tmp_path / "out.ipynb") for part in line]
    run = subprocess.Popen(
        [sys.executable, *line], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while loads not in Path(f"/proc/{run.pid}/maps").read_bytes():
        assert run.poll() is None
    run.send_signal(number)
    _, errors = run.communicate()
    assert run.returncode == 128 + number
    assert errors.startswith("alphaprune: ") and len(errors.splitlines()) == 1, errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    [
        ["-m", "alphaprune.experiment", "params/smoke/fig4.yaml", "--why"],
        ["-m", "alphaprune.comparison", "controls", "smoke", "--why"],
    ],
    ids=lambda line: line[1],
)
def test_a_listing_that_nobody_reads_to_its_end_is_one_line_too(line):
    run = subprocess.Popen(
        [sys.executable, *line], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    run.stdout.close()  # as `| head` does once it has enough
    errors = run.stderr.read()
    assert run.wait() == 128 + signal.SIGPIPE
    assert errors == "alphaprune: nobody reads the output any more; stopped\n"


def test_two_at_once_train_no_stage_twice(twins, fault):
    undisturbed, project = twins
    both = [start(project), start(project)]
    said = [run.communicate() for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    ended = [line for out, _ in said for line in out.splitlines() if ": best " in line]
    assert len(ended) == 3  # one a stage
    assert any(re.search(r"process \d+ on \S+ is at .*; waiting", out) for out, _ in said)
    assert contents(project) == contents(undisturbed)
    fault(
        "the same command twice at once",
        1,
        "one waits for the other, stage by stage; none is trained twice, and all is as of one",
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_what_was_there_stays(twins, fault):
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
        fault(
            "a full disk",
            1,
            f"named in one line, exit code 2; what was recorded stays; with room again {AS_BEFORE}",
        )
    finally:
        subprocess.run(["umount", str(stages)])


WITHOUT_RIGHTS = f"""
import os, sys
import alphaprune.stage_training
from alphaprune.experiment import main
if os.geteuid() == 0:  # who may write anywhere; the interpreter itself may lie where nobody else may read
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
main(sys.argv[1:])
"""


@pytest.fixture
def for_all():
    """A folder that every user may read, and go through."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.mark.parametrize("recorded", [0, 2, 3])
def test_results_that_cannot_be_written_are_named_and_stay(twins, for_all, recorded, fault):
    """Of three stages, so many are recorded."""
    undisturbed, _ = twins
    project = shutil.copytree(undisturbed, for_all / "project")
    for name in ["a0.9", "a0.5", "a0"][recorded:]:
        shutil.rmtree(next((project / "results/smoke/stages/fig4").glob(f"{name}-*")))
    before = contents(project)

    def rights(folders: int, files: int) -> None:
        for path in [project, *project.rglob("*")]:
            path.chmod(folders if path.is_dir() else files)

    rights(0o555, 0o444)
    line = [sys.executable, "-c", WITHOUT_RIGHTS, str(project / "params/smoke/fig4.yaml")]
    done = subprocess.run(line, cwd=project, capture_output=True, text=True)
    rights(0o755, 0o644)
    assert contents(project) == before
    if recorded == 3:
        assert done.returncode == 0 and "0 stages to train, 3 already recorded" in done.stdout, done.stderr
        return
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot be written (Permission denied)" in done.stderr
    assert subprocess.run(command(project), cwd=project, capture_output=True).returncode == 0
    assert contents(project) == contents(undisturbed)
    fault(
        f"results that may not be written, {recorded} of 3 stages recorded",
        1,
        f"named in one line, exit code 2; what is recorded stays; with the right again {AS_BEFORE}",
    )


def test_a_notebook_passes_the_signal_on_and_nothing_half_made_is_left(project, fault):
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
    fault(
        "SIGTERM to a notebook", 1, "passed on; the stage is saved, nothing half made is left, and it goes on"
    )
