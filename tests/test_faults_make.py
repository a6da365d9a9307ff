"""The whole smoke reproduction, killed 25 times at random moments: `make test-faults` runs it, some minutes."""

import hashlib
import os
import random
import re
import shutil
import subprocess
import sys
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


def test_each_damage_to_what_notebooks_and_pages_wrote_is_named_and_one_make_mends_it(whole_project, fault):
    """Every sealed file cut, emptied, deleted and with a bit flipped, and all exchanged in pairs."""
    assert started(whole_project).wait() == 0  # nothing is left to do after the test above
    results = whole_project / "results" / "smoke"
    named_in_seals = {
        line[66:] for seal in results.glob(".seals/**/*.sha256") for line in seal.read_text().splitlines()
    }
    sealed = sorted(
        results / name for name in named_in_seals if not name.startswith(("stages/", "pretrained/"))
    )
    assert {p.suffix for p in sealed} == {".ipynb", ".html", ".png", ".svg", ".txt", ".csv"}
    before, chance = {p: p.read_bytes() for p in sealed}, random.Random(2)
    check = [sys.executable, "notebooks/seals.py", str(results)]

    def named() -> list[str]:
        return subprocess.run(check, cwd=whole_project, capture_output=True, text=True).stderr.splitlines()

    assert named() == []
    for damage in ("cut", "emptied", "a bit flipped", "deleted"):
        for path, content in before.items():
            at = chance.randrange(len(content))
            flipped = content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]
            known = path.suffix in (".ipynb", ".html")  # to make, which misses them by itself
            if damage == "deleted" and not known:
                path.unlink()
            elif damage != "deleted":
                path.write_bytes({"cut": content[:at], "emptied": b"", "a bit flipped": flipped}[damage])
        lines = named()
        for path in sealed:
            name = path.relative_to(whole_project)
            whole = path.is_file() and path.read_bytes() == before[path]
            assert whole != any(line.startswith(f"alphaprune: {name} is ") for line in lines), (damage, name)
            path.write_bytes(before[path])
    pairs = list(zip(sealed[::2], sealed[1::2], strict=False))
    for one, other in pairs:
        one.write_bytes(before[other])
        other.write_bytes(before[one])
    assert len({line.partition(" is ")[0] for line in named()}) >= 2 * len(pairs)
    done = started(whole_project, stdout=subprocess.PIPE, text=True)
    said = done.communicate()[0]
    assert done.returncode == 0 and "stage 1/" not in said
    kept = (".png", ".svg", ".txt", ".csv")
    assert all(p.read_bytes() == before[p] for p in sealed if p.suffix in kept) and named() == []
    what = "notebooks, pages, figures and tables that a reproduction wrote, each file"
    fault(f"{what} cut, emptied, deleted, or with a bit flipped", 4 * len(sealed), "each is named")
    fault(
        f"{what} exchanged for another",
        2 * len(pairs),
        "each is named; one `make` makes them again, bit for bit, and trains nothing",
    )
