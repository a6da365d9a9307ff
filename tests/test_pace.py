"""Pace: the time of each method, measured apart, and what it makes of a table of budgets."""

import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphaprune import UsageError
from alphaprune.experiment import Experiment
from alphaprune.pace import COLUMNS, at_seconds, main, pace, recorded, timed
from alphaprune.timing import trusted

METHODS = ["alphaprune, folded at once, widths by sensitivity, distilled", "report's recipe", "scratch"]


@pytest.fixture
def prepared(project):
    pretrain = project / "params" / "smoke" / "pretrain.yaml"
    pretrain.write_text(pretrain.read_text().replace("max_epochs: 3", "max_epochs: 1"))
    Experiment("smoke", "pretrain", project).run(lambda line: None)
    return project


def test_a_pace_is_measured_apart_and_holds_what_precedes_training(prepared, monkeypatch, capsys):
    results, lines = prepared / "results" / "smoke", []
    before = {p for p in results.rglob("*") if p.is_file()}
    assert recorded("controls", "smoke", prepared).empty
    table = pace("controls", "smoke", prepared, METHODS, rounds=2, say=lines.append)
    assert list(table.columns) == COLUMNS and table["method"].tolist() == METHODS and len(lines) == 6
    assert (table[["before", "an_image"]] > 0).all(axis=None) and table["keep_ratio"].eq(0.34375).all()
    ours, _, scratch = table["before"]
    assert ours > scratch  # widths were measured and branches fitted
    record = results / "pace" / "controls.json"
    assert {p for p in results.rglob("*") if p.is_file()} - before == {record}
    monkeypatch.chdir(prepared)
    main(["controls", "smoke", "--method", "scratch", "--rounds", "2"])
    said = capsys.readouterr().out
    assert "[2/2] scratch: " in said and "report's recipe" in said
    again = recorded("controls", "smoke", prepared)
    assert again["method"].tolist() == METHODS  # those timed before stay
    pd.testing.assert_frame_equal(again.drop(2), table.drop(2))
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"controls\.json is damaged"):
        assert recorded("controls", "smoke", prepared).empty


def test_what_is_wrong_is_said_before_anything_trains(prepared, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    with pytest.raises(SystemExit) as e:
        main(["controls", "smoke", "--method", "magic"])
    assert e.value.code == 2 and "method 'magic' is unknown" in capsys.readouterr().err
    with pytest.raises(UsageError, match="rounds is 1"):
        pace("controls", "smoke", prepared, rounds=1)
    file = prepared / "params" / "controls.yaml"
    whole = file.read_text()
    file.write_text(
        whole + "  last:\n    settings: {init: magic}\n    stages: [{from: base, narrow: fold, lr: 0.1}]\n"
    )
    with pytest.raises(UsageError, match="init"):
        pace("controls", "smoke", prepared, say=pytest.fail)
    file.write_text(whole)
    base = prepared / Experiment("smoke", "controls", prepared).settings.base
    base.unlink()
    with pytest.raises(UsageError, match=f"{base} is missing"):
        pace("controls", "smoke", prepared, say=pytest.fail)


def test_stopped_it_says_that_nothing_is_kept(prepared):
    command = [sys.executable, "-m", "alphaprune.pace", "controls", "smoke", "--rounds", "100"]
    with subprocess.Popen(
        command, cwd=prepared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as of:
        assert of.stdout.readline().startswith("[1/")
        of.send_signal(signal.SIGTERM)
        _, error = of.communicate(timeout=120)
    assert of.returncode == 128 + signal.SIGTERM
    assert error.splitlines()[-1] == (
        "alphaprune: stopped by SIGTERM; what was timed is lost; the same command begins anew"
    )
    assert recorded("controls", "smoke", prepared).empty


rising = st.lists(st.floats(10, 90), min_size=2, max_size=5).map(sorted)


@given(rising, st.floats(0.1, 100), st.floats(1e-5, 1e-2), st.floats(0, 1))
def test_seconds_come_from_the_pace_and_accuracy_lies_between_the_budgets(
    accuracies, before, an_image, where
):
    images = [20_000 * 3**n for n in range(len(accuracies))]
    shared = {"images": images, "seconds": 1.0, "val_accuracy": accuracies}
    kinds = [("known", 0.5), ("known", 0.2), ("unknown", 0.5)]
    budgets = pd.concat(pd.DataFrame(shared | {"method": m, "keep_ratio": r}) for m, r in kinds)
    of = {"method": ["known"], "keep_ratio": 0.5, "before": before, "an_image": an_image}
    found = timed(budgets, pd.DataFrame(of))
    has = found["method"].eq("known") & found["keep_ratio"].eq(0.5)
    assert found["seconds"].notna().equals(has)
    np.testing.assert_allclose(found.loc[has, "seconds"], [before + n * an_image for n in images])
    first, last = found.loc[has, "seconds"].iloc[[0, -1]]
    inside = first * (last / first) ** where
    table = at_seconds(found, [first / 1.01, first, inside, last, last * 1.01])
    assert table.index.tolist() == ["known"]
    row = table.loc["known"]
    assert row.isna().tolist() == [True, False, False, False, True]
    assert row.iloc[1] == pytest.approx(accuracies[0]) and row.iloc[3] == pytest.approx(accuracies[-1])
    assert accuracies[0] - 1e-9 <= row.iloc[2] <= accuracies[-1] + 1e-9


def test_a_straight_line_over_the_logarithm_of_time():
    budgets = pd.DataFrame({"method": "m", "seconds": [10.0, 1000.0], "val_accuracy": [40.0, 80.0]})
    assert at_seconds(budgets, [100.0]).at["m", 100.0] == pytest.approx(60.0)
    assert at_seconds(budgets.assign(seconds=np.nan)).empty


@pytest.mark.parametrize(
    ("spread", "cores", "threads", "expected"),
    [
        (0.1, 0.2, 2, True),
        (0.16, 0.0, 2, False),
        (0.1, 0.3, 2, False),
        (0.1, 1.2, 1, True),
        (0.1, 1.3, 1, False),
    ],
)
def test_trust_needs_runs_alike_and_cores_left_alone(spread, cores, threads, expected, monkeypatch):
    monkeypatch.setattr("psutil.cpu_count", lambda: 2)
    assert trusted(spread, cores, threads) is expected
