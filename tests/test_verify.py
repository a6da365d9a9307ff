"""What `make verify` says of two results folders."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT

from alphaprune.storage import save_tensors

sys.path.insert(0, str(ROOT / "notebooks"))
import verify

HISTORY = "experiment,stage,alpha,lr,step,epoch,split,metric,value\nfig4,a,0.5,0.1,1,1,val,{metric},{value}\n"


def results(folder: Path, identity: str = "0123abcd") -> Path:
    stage = folder / "stages" / "fig4" / f"a0.5-lr0.1-{identity}"
    save_tensors(stage / "weights.safetensors", {"w": torch.tensor([1.0, 2.0])})
    (stage / "history.csv").write_text(HISTORY.format(metric="accuracy", value=0.5))
    (folder / "figures").mkdir()
    (folder / "figures" / "figure4.png").write_bytes(b"png")
    (folder / "figures" / "figure4.svg").write_bytes(b"svg")
    (folder / "scorecard.csv").write_text("id,ours,verdict\none,80.0,reproduced\n")
    return stage


@pytest.fixture
def two(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    results(tmp_path / "a")
    return tmp_path / "a", tmp_path / "b"


def kinds(found):
    return {c.kind: c for c in found}


def test_the_same_files_are_identical_whatever_the_identities(two):
    a, b = two
    results(b, identity="ffffffff")
    found = verify.compare(a, b)
    assert verify.same(found)
    assert all((c.files, c.identical, c.missing, c.largest) == (1, 1, (), {}) for c in found)
    assert "weights         1 of   1 identical" in verify.as_text("x", found)


def test_differences_are_measured(two):
    a, b = two
    stage = results(b)
    save_tensors(stage / "weights.safetensors", {"w": torch.tensor([1.0, 2.25])})
    (stage / "history.csv").write_text(HISTORY.format(metric="accuracy", value=0.375))
    (b / "scorecard.csv").write_text("id,ours,verdict\none,79.0,reproduced\n")
    (b / "figures" / "figure4.png").write_bytes(b"PNG")
    found = kinds(verify.compare(a, b))
    assert not verify.same(list(found.values()))
    assert found["weights"].largest == {"weight": 0.25} and found["weights"].identical == 0
    assert found["histories"].largest == {"accuracy": 0.125}
    assert found["scorecard"].largest == {"ours": 1.0}
    assert found["figures, PNG"].identical == 0 and found["figures, SVG"].identical == 1
    assert "weight 0.25" in verify.as_text("x", list(found.values()))


def test_other_shapes_and_rows_are_no_small_difference(two):
    a, b = two
    stage = results(b)
    save_tensors(stage / "weights.safetensors", {"w": torch.zeros(3)})
    (stage / "history.csv").write_text(HISTORY.format(metric="accuracy", value=0.5) * 2)
    found = kinds(verify.compare(a, b))
    assert found["weights"].largest == {"tensors of another shape": float("inf")}
    assert found["histories"].largest == {"rows or columns": float("inf")}


@pytest.mark.parametrize("lacking", ["a", "b"])
def test_a_missing_file_is_a_difference(two, lacking):
    a, b = two
    results(b)
    ({"a": a, "b": b}[lacking] / "figures" / "figure4.svg").unlink()
    found = kinds(verify.compare(a, b))
    assert not verify.same(list(found.values()))
    assert found["figures, SVG"].missing == ("figures/figure4.svg",)
    assert "only in one of them: figures/figure4.svg" in verify.as_text("x", list(found.values()))


def test_nothing_at_all_is_not_the_same(two):
    empty = two[1]
    assert not verify.same(verify.compare(empty, empty))


def test_stopped_it_leaves_neither_processes_nor_its_folder(tmp_path):
    command = [sys.executable, str(ROOT / "notebooks" / "verify.py")]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith("run 1 of 3")
    while not (started := psutil.Process(run.pid).children(recursive=True)):
        time.sleep(0.05)
    time.sleep(1)  # make is under way
    started = psutil.Process(run.pid).children(recursive=True) or started
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive and not list(tmp_path.glob("alphaprune-verify-*"))
