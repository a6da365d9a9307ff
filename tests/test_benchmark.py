"""What `make benchmark` measures, and what it says of it. How fast anything is, is no test."""

import shutil
import sys

import pandas as pd
import pytest
import torch
from conftest import ROOT

from alphaprune.benchmark import measure
from alphaprune.benchmark_device import compiled_on, deployed_on, replayed_on, training_on
from alphaprune.benchmark_rows import (
    COLUMNS,
    Sizes,
    Target,
    as_line,
    as_table,
)
from alphaprune.exact import full_float32
from alphaprune.measure import multiply_adds
from alphaprune.models import vgg16
from alphaprune.narrowing import folded_at_once
from alphaprune.passes import Replayed

sys.path.insert(0, str(ROOT / "notebooks"))
import benchmark

NO_WAY = "does not work here"
COMPILER = any(map(shutil.which, ("g++", "clang++", "c++")))


@pytest.fixture(scope="module")
def measured():
    lines = []
    small = Sizes(
        0.125, 0.125, batch=4, resnet_batch=1, resnet_side=32, fit_images=100, threads=1, seconds=0.1
    )
    return measure(small, lines.append), lines


def test_everything_is_measured_with_its_target(measured):
    table, lines = measured
    assert list(table.columns) == COLUMNS
    if not COMPILER:
        table = table[~table["unit"].str.contains(NO_WAY)]
    assert (table["value"] > 0).all() and table["trusted"].isin([True, False]).all()
    with_target = table[table["target"] != ""]
    parts = (
        "alpha 1",
        "alpha 0.5",
        "alpha 0",
        "images given",
        "folded, optimised",
        "of 16, optimised",
        "least squares",
    )
    for part in parts:
        assert with_target["what"].str.contains(part, regex=False).any(), part
    assert with_target["holds"].isin([True, False]).all()
    assert len([line for line in lines if not line.startswith("[") and NO_WAY not in line]) == len(table)
    plain = table[table["what"].str.endswith(": plain") | table["what"].str.endswith("original, as it is")]
    assert len(plain) == 4 and (plain["value"] == 1).all()  # what the others are compared with
    assert len(as_table(table).splitlines()) == len(table) + 2
    ours, theirs, both = (
        table[table["what"].str.match(rf"ResNet-18, batch \d+: {what}$")].iloc[0]
        for what in ("folded, optimised", "Torch-Pruning, optimised", "folded against .*")
    )
    assert both["spread"] == max(ours["spread"], theirs["spread"])
    assert both["trusted"] == (ours["trusted"] and theirs["trusted"])


def test_training_on_a_device_is_measured_from_the_epoch_to_the_step():
    device = "cuda" if torch.cuda.is_available() else "cpu"  # one process trains on one
    peak = 1e9
    rows = training_on(device, 0.0625, batch=4, images=10, seconds=0.1, peak=peak)
    table = pd.DataFrame(rows).reindex(columns=COLUMNS).set_index("what")
    assert table.index.is_unique and all(what.startswith(f"{device}, VGG-16 of width 0.0625") for what in table.index)  # fmt: skip
    at = lambda ending: table.loc[[w for w in table.index if w.endswith(ending)]].iloc[0]  # noqa: E731
    for name in ("alpha 1", "alpha 0.5", "alpha 0", "folded"):
        seconds, rate, share = (
            at(f": {name}, {of}")["value"]
            for of in ("an epoch of 10 images", "training", "share of the peak")
        )
        assert seconds * rate == pytest.approx(8)  # what fills no batch is left out
        assert share > 0
    assert at("folded, share of the peak")["value"] / at("folded, training")["value"] == pytest.approx(
        100 * 6 * folded_cost() / peak
    )
    assert table["trusted"].isin([True, False]).all()
    assert at("of a step at alpha 1")["target"] == "at most 2" and at("of a step at alpha 1")["value"] > 0
    assert len(as_table(table.reset_index()).splitlines()) == len(table) + 2


def test_what_is_deployed_on_a_device_is_measured_in_both_precisions():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = deployed_on(device, 0.0625, batch=4, seconds=0.1)
    table = pd.DataFrame(rows).reindex(columns=COLUMNS).set_index("what")
    shared = [
        f"{device}, VGG-16 of width 0.0625, {precision}, batch {batch}: {network}"
        for precision in ("float32", "bfloat16")
        for batch in (1, 4)
        for network in ("original", "folded, multiples of 8")
    ]
    assert list(table.index) == [f"{of}, {what}" for of in shared for what in ("inference", "memory")]
    times, held = table.iloc[::2], table.iloc[1::2]
    assert (times["milliseconds"] > 0).all() and times["value"].iloc[::2].eq(1).all()
    assert held["value"].gt(0).all() and held["unit"].eq("MiB at most").all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_on_a_gpu_is_timed_from_a_cuda_graph_too_and_gives_the_same_answer():
    rows = replayed_on(0.0625, batches=(1, 4), seconds=0.1)
    ways = [r["what"].partition(": ")[2] for r in rows[:4]]
    folded = "folded, multiples of 8"
    assert ways == [
        f"{w}, in turns" for w in ("original", folded, "original, CUDA graph", f"{folded}, CUDA graph")
    ]
    assert len(rows) == 16 and all(r["milliseconds"] > 0 for r in rows)
    network = folded_at_once(vgg16(0.0625).eval(), 0.5, torch.randn(1, 3, 32, 32), 8).cuda()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    with full_float32(), torch.no_grad():
        replay = Replayed(network, x)
        x.copy_(torch.randn_like(x))
        assert torch.allclose(replay(), network(x), atol=1e-4)


def test_a_step_is_compiled_beside_eager_and_what_does_not_work_says_why():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    )
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    rows = compiled_on(device, "small", network, x, seconds=0.1)
    ways = ["eager", "torch.compile", *(["CUDA graph"] if device == "cuda" else [])]
    assert {r["what"].rpartition(", ")[2] for r in rows} == set(ways)
    assert rows[0]["value"] == 1 and rows[0]["milliseconds"] > 0
    compiled = next(r for r in rows if r["what"].endswith("torch.compile"))
    assert compiled["value"] > 0 if COMPILER else NO_WAY in compiled["unit"]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_way_that_does_not_work_says_why(monkeypatch):
    def without_compiler(network):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", without_compiler)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    rows = compiled_on("cpu", "small", network, torch.randn(2, 3, 2, 2), seconds=0.1)
    assert [as_line(r) for r in rows if NO_WAY in r["unit"]] == [
        "cpu, small, batch 2: a step, torch.compile: not known since it does not work here (no C++ compiler)"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_without_a_gpu_there_is_one_line_and_nothing_is_written(capsys):
    assert benchmark.main(["--gpu"]) == 2
    assert capsys.readouterr().err == (
        "alphaprune: torch sees no GPU here; run this on a machine with one, and a torch built for it\n"
    )
    with pytest.raises(SystemExit):
        benchmark.main(["--gpu", "--check"])


def folded_cost():
    x = torch.randn(1, 3, 32, 32)
    return multiply_adds(folded_at_once(vgg16(0.0625), 0.34375, x), x)


def test_a_peak_that_is_not_known_says_so():
    unknown = row(None, None) | {"value": float("nan"), "unit": "%", "target": ""}
    assert as_line(unknown).startswith("w: not known %") and "| not known | % |" in as_table(
        pd.DataFrame([unknown])
    )


def row(holds, trusted):
    return {"what": "w", "milliseconds": 1.0, "value": 0.5, "unit": "u", "target": "at most 0.4", "holds": holds,
            "spread": 0.3, "others": 1.0, "trusted": trusted, "threads": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([row(True, True), row(None, True)], 0),
        ([row(True, False)], 0),
        ([row(False, True), row(True, True)], 1),
        ([row(False, False), row(True, True)], 2),
        ([row(False, False), row(False, True)], 1),
        ([row(False, None)], 1),
    ],
)
def test_a_ratio_that_falls_short_fails_unless_the_machine_was_busy(rows, code):
    assert benchmark.verdict(pd.DataFrame(rows)) == code


def test_what_is_not_to_be_trusted_says_so():
    line = as_line(row(False, False))
    assert "FALLS SHORT" in line and "; not to be trusted: spread 30%, others kept 1.00 cores busy" in line
    assert as_line(row(True, True)).endswith("; spread 30%")
    assert "not to be trusted" in as_table(pd.DataFrame([row(True, False)]))


def test_a_check_says_how_many_figures_are_not_to_be_trusted(monkeypatch, capsys):
    rows = [row(True, True), row(True, False), row(None, False)]
    monkeypatch.setattr(benchmark, "measure", lambda say: pd.DataFrame(rows))
    assert benchmark.main(["--check"]) == 0
    assert capsys.readouterr().out == "All targets hold. Of 3 figures 2 are not to be trusted.\n"


def test_a_target_is_a_bound():
    assert Target(at_most=0.5).holds(0.5) and not Target(at_most=0.5).holds(0.51)
    assert Target(at_least=0.5).holds(0.5) and not Target(at_least=0.5).holds(0.49)
    assert str(Target(at_least=2)) == "at least 2"
