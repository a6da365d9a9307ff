"""Controls: every method the same images, its own learning rate, nothing run twice."""

import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pandas as pd
import psutil
import pytest
import yaml
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from alphaprune import UsageError, comparison, data, layer_widths
from alphaprune.comparison import (
    COLUMNS,
    climb,
    compare,
    experiment,
    load_comparison,
    main,
    original,
    provenance,
    reasons,
    settings_by_method,
    summary,
)
from alphaprune.experiment import Experiment
from alphaprune.method_plots import beside_published, cliffs
from alphaprune.records import write_record

GRID = [0.005, 0.01, 0.02, 0.05, 0.1]


@given(st.integers(0, 4), st.integers(0, 4))
def test_climbing_finds_the_top_of_a_hill_and_tries_no_more_than_the_way(top, first):
    tried = []

    def reached(x):
        tried.append(x)
        return -abs(GRID.index(x) - top)

    assert climb(GRID, GRID[first], reached) == GRID[top]
    assert len(set(tried)) <= abs(top - first) + 3


@pytest.fixture
def prepared(project):
    pretrain = project / "params" / "smoke" / "pretrain.yaml"
    pretrain.write_text(pretrain.read_text().replace("max_epochs: 3", "max_epochs: 1"))
    Experiment("smoke", "pretrain", project).run(lambda line: None)
    file = project / "params" / "controls.yaml"
    content = yaml.safe_load(file.read_text())
    kept = {
        k: content["methods"][k]
        for k in ("alphaprune, folded at once, distilled", "scratch", "torch-pruning L1", "report's recipe")
    }
    file.write_text(yaml.safe_dump(content | {"methods": kept, "lrs": [0.01, 0.02], "keep_ratios": [0.5]}))
    return project


def ranked(importance):
    """A method whose widths Torch-Pruning chooses."""
    kind = f"torch-pruning-{importance}"
    return {"settings": {"widths": kind}, "stages": [{"from": "base", "narrow": kind, "lr": "{lr}"}]}


def test_no_method_trains_where_one_of_its_ratios_cannot_be(prepared):
    file = prepared / "params" / "controls.yaml"
    content = yaml.safe_load(file.read_text())
    scratch = content["methods"]["scratch"]
    file.write_text(
        yaml.safe_dump(content | {"methods": {"scratch": scratch, "torch-pruning, ranked": ranked("bn")}})
    )
    for first, asked in (
        ([0.5], [0.5, 0.01]),
        ([0.01, 0.5], [0.5]),
    ):  # the search is at the first of the file
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"keep_ratios": first}))
        with pytest.raises(UsageError, match=r"keep_ratio 0\.01 leaves none of the .* channels"):
            compare("controls", "smoke", prepared, keep_ratios=asked, say=lambda line: None)
    assert not (prepared / "results" / "smoke" / "stages" / "controls").exists()


def test_ranked_widths_are_of_the_weights_and_why_says_so_where_these_are_gone(prepared):
    file = prepared / "params" / "controls.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(
        yaml.safe_dump(
            content | {"methods": {"torch-pruning, ranked": ranked("l2")}, "lrs": [0.01], "first_lr": 0.01}
        )
    )
    of = experiment("controls", "smoke", "torch-pruning, ranked", 0.01, 0.5, 0, root=prepared)
    assert of.seconds_for_widths() == 0
    (line,) = reasons("controls", "smoke", prepared)
    assert line.endswith("lr 0.01 is to be tried at keep_ratio 0.5: stage-0 not recorded yet")
    (prepared / "results" / "smoke" / "pretrained" / "vgg16.safetensors").unlink()
    layer_widths._RANKED.clear()  # of this process, which has asked before
    (line,) = reasons("controls", "smoke", prepared)
    assert "vgg16.safetensors is missing" in line


def test_the_table_is_written_equal_images_and_nothing_trains_twice(prepared):
    lines = []
    table = compare("controls", "smoke", prepared, seeds=[0, 1], jobs=2, say=lines.append)
    file = prepared / "results" / "smoke" / "controls.csv"
    written = pd.read_csv(file)
    assert (
        list(written.columns) == COLUMNS and len(written) == 8 and len(lines) == 8
    )  # a search and a run each
    assert written["params"].nunique() == 1 and written["macs"].nunique() == 1
    assert set(written["images"]) == {6 * 128}
    assert written[["val_accuracy", "test_accuracy"]].stack().between(0, 100).all()
    assert written["searched"].eq("0.01 0.02").all()
    folders = sorted((prepared / "results" / "smoke" / "stages" / "controls").glob("*/run.json"))
    times = [f.stat().st_mtime_ns for f in folders]
    file.unlink()
    pd.testing.assert_frame_equal(
        table, compare("controls", "smoke", prepared, seeds=[0, 1], say=lines.append)
    )
    assert times == [f.stat().st_mtime_ns for f in folders]
    rows = summary(table)
    assert (rows["seeds"] == 2).all() and rows["val_mean"].is_monotonic_decreasing


def test_a_setting_is_a_methods_own_or_the_default():
    ridges = settings_by_method("controls", "quick", "init_ridge", ROOT)
    assert ridges["alphaprune, folded at once"] == 0.1
    assert ridges["alphaprune, folded at once, closest fit"] == ridges["scratch"] == 1e-4


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_the_lowest_panel_of_each_column_has_its_scale(ways):
    point = {
        "experiment": "e",
        "stage": "s",
        "alpha": 0.0,
        "split": "val",
        "metric": "accuracy",
        "value": 0.5,
    }
    rows = [point | {"method": f"way {i}", "images": n} for i in range(ways) for n in (0, 128)]
    panels = [ax for ax in cliffs(pd.DataFrame(rows), "t", columns=3).axes if ax.axison]
    scaled = [bool(ax.get_xlabel()) and ax.xaxis.get_tick_params()["labelbottom"] for ax in panels]
    assert scaled == [i >= ways - 3 for i in range(ways)]


def test_a_colour_of_the_cliffs_means_one_thing_where_some_ways_have_an_alpha():
    point = {"experiment": "e", "stage": "s", "split": "val", "value": 0.5}
    rows = [
        point | {"method": way, "alpha": alpha, "metric": metric, "images": n}
        for way, alpha, metrics in (
            ("annealed", 0.5, ("accuracy", "fold_now_running")),
            ("plain", None, ("accuracy",)),
        )
        for metric in metrics
        for n in (0, 128)
    ]
    (legend,) = cliffs(pd.DataFrame(rows), "t").legends
    colours = [line.get_color() for line in legend.get_lines()]
    assert len(colours) == len(set(colours)) == 2


def test_the_original_is_measured_once_and_then_its_weights_are_not_needed(prepared, monkeypatch):
    weights = prepared / "results" / "smoke" / "pretrained" / "vgg16.safetensors"
    found = original("controls", "smoke", prepared)
    assert found["params"] == 232274 and 0 <= found["test_accuracy"] <= 100
    monkeypatch.setattr(data, "load_test", None)  # whoever reads the test images again fails
    weights.unlink()
    assert original("controls", "smoke", prepared) == found
    record = weights.with_name("original.json")
    record.write_bytes(record.read_bytes().replace(b'"val_images": 64', b'"val_images": 63'))
    with pytest.warns(UserWarning, match="is damaged .*; it is measured again"), pytest.raises(UsageError):
        original("controls", "smoke", prepared)


def test_what_a_method_ends_in_needs_no_weights_but_its_own(prepared):
    table = compare("controls", "smoke", prepared, seeds=[0], say=lambda line: None)
    results = prepared / "results" / "smoke"
    (results / "pretrained" / "vgg16.safetensors").unlink()
    for measured in (found := list(results.glob("stages/controls/*/final.json"))):
        measured.unlink()
    assert len(found) == 4
    again = compare("controls", "smoke", prepared, seeds=[0], say=lambda line: None)
    pd.testing.assert_frame_equal(again, table)


def test_ours_and_published_results_are_all_in_the_picture():
    own = pd.DataFrame({"method": ["alphaprune, a"], "macs": [12], "test_mean": [93.4], "test_std": [0.2]})
    others = pd.DataFrame({"name": ["A", "B"], "macs_left": [11.7, 21.4], "test_accuracy": [91.7, 93.8]})
    (ax,) = beside_published(own, (100, 94.5), others, "t").axes
    assert {t.get_text() for t in ax.texts} == {"before pruning, 94.5 %", "93.4", "A, 91.7", "B, 93.8"}
    low, high = ax.get_ylim()
    assert low < 91.7 and high > 94.5 and ax.get_xlim()[0] < 11.7


def test_why_names_what_would_be_trained_and_what_changed(prepared, capsys, monkeypatch):
    monkeypatch.chdir(prepared)
    one = "alphaprune, folded at once, distilled"

    def why(*only: str) -> dict[str, str]:
        main(["controls", "smoke", "--why", *(word for method in only for word in ("--method", method))])
        lines = [line.removeprefix("controls, ") for line in capsys.readouterr().out.splitlines()]
        return dict(line.split(": ", 1) for line in lines)

    assert why()[one] == "lr 0.02 is to be tried at keep_ratio 0.5: stage-0 not recorded yet"
    assert why(one, "scratch") == {
        "each of 2 methods": "lr 0.02 is to be tried at keep_ratio 0.5: stage-0 not recorded yet"
    }
    compare("controls", "smoke", prepared, [one], seeds=[0], say=lambda line: None)
    capsys.readouterr()
    said = why()
    best = re.search("lr (0.0[12])", said[one])[1]
    assert (
        said[one]
        == f"2 of 3 runs are to be trained, lr {best}; at keep_ratio 0.5, seed 1: stage-0 not recorded yet"
    )
    assert said["scratch"] == "lr 0.02 is to be tried at keep_ratio 0.5: stage-0 not recorded yet"
    main(["controls", "smoke", "--why", "--method", one, "--seed", "0"])
    assert capsys.readouterr().out == f"controls, {one}: its run is recorded, lr {best}\n"
    main(["controls", "smoke", "--why", "--method", one, "--budgets"])
    assert re.fullmatch(
        f"controls --budgets, {one}: 4 of 5 runs are to be trained, lr {best}; at keep_ratio 0.5, seed 0, .* times the budget: .*\n",
        capsys.readouterr().out,
    )
    main(["mirrored", "controls", "smoke", "--why"])
    several = [line.partition(", ")[0] for line in capsys.readouterr().out.splitlines()]
    assert list(dict.fromkeys(several)) == ["mirrored", "controls"]
    file = prepared / "params" / "smoke" / "controls.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"weight_decay": 0.01}))
    changed = r"\(recipe.weight_decay [\d.]+ -> 0.01\)"
    assert re.fullmatch(
        f"lr 0.02 is to be tried at keep_ratio 0.5: stage-0 recorded with other inputs {changed}", why()[one]
    )
    stages = prepared / "results" / "smoke" / "stages" / "controls"
    assert len(list(stages.glob("*/run.json"))) == 2  # nothing was trained for an answer


def test_what_was_left_without_test_accuracy_and_weights_is_trained_anew(prepared, capsys, monkeypatch):
    table = compare("controls", "smoke", prepared, ["scratch"], seeds=[0], say=lambda line: None)
    stages = prepared / "results" / "smoke" / "stages" / "controls"
    for file in [*stages.glob("*/final.json"), *stages.glob("*/weights.safetensors*")]:
        file.unlink()
    monkeypatch.chdir(prepared)
    main(["controls", "smoke", "--why"])
    assert "weights of stage-0 are missing, and its test accuracy was not read" in capsys.readouterr().out
    again = compare("controls", "smoke", prepared, ["scratch"], seeds=[0], say=lambda line: None)
    pd.testing.assert_frame_equal(table.drop(columns="seconds"), again.drop(columns="seconds"))
    assert len(list(stages.glob("*/weights.safetensors"))) == 1  # that one, and not what the search tried


def test_a_test_accuracy_that_is_damaged_or_of_other_weights_is_read_anew(prepared):
    table = compare("controls", "smoke", prepared, ["scratch"], seeds=[0], say=lambda line: None)
    [file] = (prepared / "results" / "smoke" / "stages" / "controls").glob("*/final.json")
    whole, weights = file.read_bytes(), file.with_name("weights.safetensors")
    changed = json.loads(whole) | {"test_accuracy": 1.0, "weights_sha256": "0" * 64}
    del changed["record_format"], changed["record_sha256"]
    write_record(file, changed)
    again = compare("controls", "smoke", prepared, ["scratch"], seeds=[0], say=lambda line: None)
    assert again["test_accuracy"].tolist() == table["test_accuracy"].tolist() and file.read_bytes() == whole
    file.write_bytes(whole[:-40])  # damaged, and the weights left behind, as after a clone
    weights.unlink()
    again = compare("controls", "smoke", prepared, ["scratch"], seeds=[0], say=lambda line: None)
    assert again["test_accuracy"].tolist() == table["test_accuracy"].tolist() and weights.is_file()


def test_a_table_has_one_row_a_run_also_where_the_budget_has_changed(prepared):
    only = {"methods": ["scratch"], "seeds": [0], "say": lambda line: None}
    compare("controls", "smoke", prepared, **only)
    file = prepared / "params" / "smoke" / "controls.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"max_epochs": 2}))
    compare("controls", "smoke", prepared, **only)
    written = pd.read_csv(prepared / "results" / "smoke" / "controls.csv")
    assert written["images"].tolist() == [2 * 128]


def test_a_budget_below_an_epoch_a_stage_is_an_epoch_of_fewer_images(prepared):
    file = prepared / "params" / "controls.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"budgets": [0.1, 0.2, 0.5]}))
    quick = {"methods": ["report's recipe"], "seeds": [0], "say": lambda line: None}
    table = compare("controls", "smoke", prepared, budgets=True, **quick)
    # Six stages of an epoch, of a batch of 32 images, which is the least, of half of the 128, and of all.
    assert table["images"].tolist() == [6 * 32, 6 * 64, 6 * 128]
    command = provenance("controls", "smoke", table, budgets=True, root=prepared)["command"]
    assert command == ["python -m alphaprune.comparison controls smoke --budgets"]


def test_a_loss_that_is_not_finite_is_said_and_the_ridge_is_recorded(prepared, capfd):
    file = prepared / "params" / "controls.yaml"
    file.write_text(
        yaml.safe_dump(yaml.safe_load(file.read_text()) | {"lrs": [1e12], "first_lr": 1e12, "budgets": []})
    )
    one = "alphaprune, folded at once, distilled"
    compare("controls", "smoke", prepared, [one], seeds=[0], say=lambda line: None)
    told = f"{one}, keep_ratio 0.5, lr 1e\\+12: stage stage-0 ended at step \\d+, where the loss was no longer finite"
    assert re.search(told, capfd.readouterr().out)
    of = experiment("controls", "smoke", one, 1e12, 0.5, 0, root=prepared)
    fitted = of.record(of.stages[-1].name)["least_squares"]
    assert all(found["ridge"] >= 0.1 and 0 <= found["unread"] <= 1 for found in fitted.values()) and fitted


def test_a_process_that_is_killed_is_no_traceback(prepared):
    line = [sys.executable, "-m", "alphaprune.comparison", "controls", "smoke", "--seed", "0"]
    run = subprocess.Popen(line, cwd=prepared, stderr=subprocess.PIPE, text=True)
    stages = prepared / "results" / "smoke" / "stages" / "controls"
    while run.poll() is None and not list(stages.glob("*/resume.*")):
        time.sleep(0.05)
    workers = [p for p in psutil.Process(run.pid).children() if "spawn_main" in " ".join(p.cmdline())]
    workers[0].kill()
    _, errors = run.communicate()
    assert run.returncode == 2 and "Traceback" not in errors, (
        errors
    )  # multiprocessing itself may say what it cleans up
    assert errors.startswith("alphaprune: a process that trained was killed; run the same command again")


def test_in_a_worker_ctrl_c_is_left_to_the_parent():
    code = """
import os, signal
from alphaprune.interrupt import SafePoints, leave_to_parent
leave_to_parent()
with SafePoints() as signals:
    os.kill(os.getpid(), signal.SIGINT)
    assert not signals.wanted
    os.kill(os.getpid(), signal.SIGTERM)  # the first it hears of: it saves, and then stops
    assert signals.wanted
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stopped_it_saves_and_begins_nothing_that_waits(prepared):
    line = [sys.executable, "-m", "alphaprune.comparison", "controls", "smoke", "--seed", "0"]
    run = subprocess.Popen(line, cwd=prepared, stderr=subprocess.PIPE, text=True)
    stages = prepared / "results" / "smoke" / "stages" / "controls"
    while run.poll() is None and not list(stages.glob("*/resume.*")):  # until one is under way
        time.sleep(0.05)
    before = len(list(stages.glob("*/run.json")))
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, errors
    assert "the same command goes on from there" in errors
    assert len(list(stages.glob("*/run.json"))) <= before + 1  # of some twenty


def test_a_further_ratio_has_a_search_of_its_own_from_the_rate_of_the_first(prepared, monkeypatch):
    file = prepared / "params" / "controls.yaml"
    grid = [0.01, 0.02, 0.05, 0.1]
    content = yaml.safe_load(file.read_text()) | {"lrs": grid, "first_lr": 0.01}
    file.write_text(yaml.safe_dump(content))
    best = {0.5: 0.05, 0.25: 0.1}

    def hill(of):  # what such short trainings reach is chance; here each ratio has a rate that is best
        return -abs(grid.index(of.stages[-1].stage.lr) - grid.index(best[of.settings.keep_ratio]))

    @contextmanager
    def threads(jobs):  # in this process, where it is replaced
        with ThreadPoolExecutor(1) as pool:
            yield pool

    monkeypatch.setattr(comparison, "_reached", hill)
    monkeypatch.setattr(comparison, "_workers", threads)
    lines: list[str] = []
    table = compare("controls", "smoke", prepared, ["scratch"], [0.5, 0.25], [0], say=lines.append)
    assert lines[0] == "[rate 1/2] scratch, keep_ratio 0.5: 0.05, the best of 0.01 0.02 0.05 0.1"
    assert "[rate 2/2] scratch, keep_ratio 0.25: 0.1, the best of 0.02 0.05 0.1" in lines
    assert table[["keep_ratio", "lr"]].to_numpy().tolist() == [[0.5, 0.05], [0.25, 0.1]]
    for lr, trained in ((0.01, False), (0.02, True)):
        of = experiment("controls", "smoke", "scratch", lr, 0.25, 0, root=prepared)
        assert (of.record(of.stages[-1].name) is not None) is trained
    assert reasons("controls", "smoke", prepared, ["scratch"], [0.5, 0.25], [0]) == [
        "controls, scratch: all 2 runs are recorded, lr 0.05 at keep_ratio 0.5, 0.1 at keep_ratio 0.25"
    ]


def test_rows_of_other_seeds_do_not_stay_with_another_rate(prepared):
    only = {"methods": ["scratch"], "say": lambda line: None}
    both = compare("controls", "smoke", prepared, seeds=[0, 1], **only)
    file = prepared / "results" / "smoke" / "controls.csv"
    file.write_text(both.assign(lr=0.5).to_csv(index=False))
    compare("controls", "smoke", prepared, seeds=[0], **only)
    assert pd.read_csv(file)["seed"].tolist() == [0]
    compare("controls", "smoke", prepared, seeds=[1], **only)
    assert pd.read_csv(file)["seed"].tolist() == [0, 1]


def test_longer_budgets_train_on_more_images_and_rows_of_earlier_calls_stay(prepared):
    file = prepared / "params" / "controls.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"budgets": [2, 0.5]}))
    lines: list[str] = []
    table = compare("controls", "smoke", prepared, methods=["scratch"], budgets=True, say=lines.append)
    assert list(table["images"]) == [3 * 128, 6 * 128, 12 * 128] and table["lr"].nunique() == 1
    assert table["start_accuracy"].nunique() == 1  # the same network, before any training
    said = [line.split(", ")[2].split(":")[0] for line in lines if "% validation" in line]
    assert said == ["768 images", "384 images", "1,536 images"]  # what is there already, then the cheap first
    compare("controls", "smoke", prepared, methods=["torch-pruning L1"], budgets=True, say=lambda line: None)
    written = pd.read_csv(prepared / "results" / "smoke" / "controls_budgets.csv")
    assert list(written["method"]) == ["scratch"] * 3 + ["torch-pruning L1"] * 3

    def stopped(line: str) -> None:
        if line.startswith("[2/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare("controls", "smoke", prepared, methods=["scratch"], budgets=True, say=stopped)
    assert pd.read_csv(prepared / "results" / "smoke" / "controls_budgets.csv").equals(written)


def test_the_methods_of_the_project_can_all_be_begun(project):
    names = [m.split(",")[0].split()[0] for m in load_comparison("controls", ROOT).methods]
    assert set(names) == {"alphaprune", "torch-pruning", "scratch", "report's"}


def test_a_keep_ratio_of_many_digits_is_one_row_however_often_it_is_asked_for(prepared):
    only = {"methods": ["scratch"], "seeds": [0], "keep_ratios": [43 / 128], "say": lambda line: None}
    for _ in range(2):
        compare("controls", "smoke", prepared, **only)
    written = pd.read_csv(prepared / "results" / "smoke" / "controls.csv")
    assert written["keep_ratio"].tolist() == [43 / 128]


def test_what_is_wrong_is_one_line(prepared, monkeypatch, capsys):
    monkeypatch.chdir(prepared)
    with pytest.raises(UsageError, match="method 'torch' is unknown; there are: "):
        compare("controls", "smoke", prepared, methods=["torch"])
    with pytest.raises(UsageError, match="'torch-pruning l1' is unknown; did you mean 'torch-pruning L1'"):
        compare("controls", "smoke", prepared, methods=["torch-pruning l1"])
    with pytest.raises(SystemExit, match="2"):
        main(["controls", "smoke", "--method", "torch"])
    assert capsys.readouterr().err.count("\n") == 1
    file = prepared / "params" / "controls.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"first_lr": 0.3}))
    with pytest.raises(UsageError, match="first_lr"):
        load_comparison("controls", prepared)
