"""The notebooks that compare methods, by the Makefile at smoke, with fewer methods, rates and seeds."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from conftest import make
from safetensors.torch import load_file

from alphaprune.measure import multiply_adds, parameters
from alphaprune.models import vgg16
from alphaprune.narrowing import folded_at_once
from alphaprune.provenance import read
from alphaprune.scorecard import guessing
from alphaprune.settings import load_settings

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def trimmed(whole_project):
    """The project with the first, two blended and the last method of the cliff, and one control of each kind."""
    chosen = {
        "cliff": (
            "report's recipe",
            "alphaprune, layers matched, distilled",
            "alphaprune, annealed, distilled",
            "alphaprune, folded at once, distilled",
        ),
        "controls": (
            "alphaprune, annealed, widths by sensitivity, distilled",
            "alphaprune, folded at once, widths by sensitivity, distilled",
            "torch-pruning L1, distilled",
            "scratch, distilled",
            "report's recipe",
        ),
        "rounded": ("alphaprune, annealed, multiples of 4, distilled",),
        "mirrored": (
            "alphaprune, annealed, mirrored, widths by sensitivity, distilled",
            "report's recipe, mirrored",
        ),
    }
    fewer = {
        "cliff": {},
        "rounded": {"seeds": [0, 1]},
        "mirrored": {"seeds": [0, 1], "keep_ratios": [0.34375]},
        "controls": {"seeds": [0, 1], "keep_ratios": [0.5, 0.34375], "budgets": [0.5]},
    }
    for name, methods in chosen.items():
        file = whole_project / "params" / f"{name}.yaml"
        content = yaml.safe_load(file.read_text())
        kept = {m: content["methods"][m] for m in methods}
        content |= {"methods": kept, "lrs": [0.02], "first_lr": 0.02, **fewer[name]}
        file.write_text(yaml.safe_dump(content, sort_keys=False))
    return whole_project


def test_the_cliff(trimmed):
    done = make(trimmed, "cliff")
    assert done.returncode == 0, done.stderr[-2000:]
    results = trimmed / "results" / "smoke"
    for figure in ("cliff", "cliff_untrained", "cliff_shares", "cliff_ranking"):
        assert (results / "figures" / f"{figure}.png").is_file()
    table = pd.read_csv(results / "cliff.csv")
    assert len(table) == 4 and table["images"].nunique() == 1 and table["macs"].nunique() == 1
    assert "against folding at once" in (results / "html" / "cliff.html").read_text()


def test_controls(trimmed):
    done = make(trimmed, "pace", "controls")
    assert done.returncode == 0, done.stderr[-2000:]
    results = trimmed / "results" / "smoke"
    for figure in ("controls", "controls_alpha", "pareto", "budgets"):
        assert (results / "figures" / f"{figure}.png").is_file()
    table = pd.read_csv(results / "controls.csv")
    assert len(table) == 5 * 2 * 2 and table["images"].nunique() == 1
    longer = pd.read_csv(results / "controls_budgets.csv")
    assert len(longer) == 5 * 2 and longer["images"].nunique() == 2
    for figure, budgets, rows in (("controls", "", table), ("budgets", " --budgets", longer)):
        found = read(results / "figures" / f"{figure}.svg")
        timed = ["python -m alphaprune.pace controls smoke"] if budgets else []
        assert found["command"] == [f"python -m alphaprune.comparison controls smoke{budgets}", *timed]
        assert "params/controls.yaml" in found["parameters"]
        records = [r for run in found["runs"] for r in run["records"]]
        assert len(records) > len(rows) and all((trimmed / r["path"]).is_file() for r in records)
    page = (results / "html" / "controls.html").read_text()
    assert "ours_ahead" in page and "DECORE-50" in page and "Seconds before training" in page


def test_the_best_recipe(trimmed):
    done = make(trimmed, "best")
    assert done.returncode == 0, done.stderr[-2000:]
    results = trimmed / "results" / "smoke"
    assert all((results / "figures" / f"{figure}.png").is_file() for figure in ("best", "best_course"))
    bundle = {f.name for f in (results / "best").iterdir()}
    assert {"weights.safetensors", "model.py", "certificate.json", "record.json"} <= bundle
    record = json.loads((results / "best" / "record.json").read_text())
    table = pd.read_csv(results / "controls.csv").set_index(["method", "keep_ratio", "seed"]).sort_index()
    row = table.loc[(record["method"], 0.34375, record["seed"])]
    reached = table.loc[(record["method"], 0.34375), "val_accuracy"].mean()
    chance = 100 * guessing(64, load_settings("smoke", "controls", trimmed).max_epochs)
    page = (results / "html" / "best.html").read_text()
    assert ("at chance: guessing on 64 validation images" in page) == (reached <= chance)
    assert row["test_accuracy"] == pytest.approx(record["test_accuracy"], rel=1e-5)  # six digits in the table
    ways = pd.read_csv(results / "best_ways.csv").set_index("way")
    assert list(ways.index) == ["as it is", "optimised", "bfloat16"]
    assert ways.at["as it is", "val_accuracy"] == pytest.approx(row["val_accuracy"], rel=1e-5)
    network = load_file(results / "best" / "weights.safetensors")
    assert sum(t.numel() for name, t in network.items() if not name.endswith(STATISTICS)) == row["params"]


def test_the_recipe_of_the_whole_network(trimmed):
    """Folded before it is trained: there is no alpha, and no certificate."""
    method = "alphaprune, folded at once, widths by sensitivity, distilled"
    given = [f"{k} {v}" for k, v in {"preset": "smoke", "comparison": "full_size", "seeds": "[0]"}.items()]
    options = [part for item in given for part in ("-p", *item.split())]
    out = trimmed / "results" / "smoke" / "notebooks" / "full_size.ipynb"
    done = subprocess.run(
        [sys.executable, "notebooks/execute.py", "notebooks/13_best_recipe.ipynb", out, *options, "-p", "method", method],
        cwd=trimmed, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = trimmed / "results" / "smoke"
    assert "not searched" in out.read_text() and "folded before it was trained" in out.read_text()
    assert not (results / "best" / "certificate.json").exists()
    table = pd.read_csv(results / "full_size.csv")
    assert table["method"].tolist() == [method] and table["lr"].tolist() == [0.1]
    network = load_file(results / "best" / "weights.safetensors")
    assert sum(v.numel() for k, v in network.items() if not k.endswith(STATISTICS)) == table["params"].item()


def test_rounded_widths(trimmed):
    done = make(trimmed, "rounded")
    assert done.returncode == 0, done.stderr[-2000:]
    results = trimmed / "results" / "smoke"
    rounded, beside = (pd.read_csv(results / f"{name}.csv") for name in ("rounded", "controls"))
    beside = beside[beside["method"].str.contains("annealed, widths") & (beside["keep_ratio"] == 0.34375)]
    assert len(rounded) == len(beside) == 2
    x = torch.zeros(1, 3, 32, 32)
    one_ratio = folded_at_once(vgg16(0.125), 0.34375, x)
    assert rounded["macs"].max() <= multiply_adds(one_ratio, x)
    assert rounded["params"].max() <= parameters(one_ratio)
    channels = pd.read_csv(results / "rounded_channels.csv").iloc[:-1]  # the last layer has a channel a class
    ours = channels["alphaprune, annealed, multiples of 4, distilled, keep_ratio 0.34375"]
    assert (
        (ours % 4 == 0).all() and (ours <= channels["original"]).all() and (ours < channels["original"]).any()
    )
    assert (results / "figures" / "rounded.png").is_file()


def test_images_that_are_not_cropped(trimmed):
    done = make(trimmed, "mirrored")
    assert done.returncode == 0, done.stderr[-2000:]
    results = trimmed / "results" / "smoke"
    mirrored, beside = (pd.read_csv(results / f"{name}.csv") for name in ("mirrored", "controls"))
    beside = beside[beside["method"].isin(mirrored["method"].str.replace(", mirrored", ""))]
    beside = beside[beside["keep_ratio"] == 0.34375]
    assert len(mirrored) == len(beside) == 4
    assert sorted(mirrored["macs"]) == sorted(beside["macs"])
    augmented = {
        json.loads(f.read_text())["determines"]["recipe"].get("augment")
        for f in (results / "stages" / "mirrored").glob("*/run.json")
    }
    assert augmented == {"mirror"}
    assert (results / "figures" / "mirrored.png").is_file()
    page = (results / "html" / "mirrored.html").read_text()
    assert "of the loss of report" in page and "100.0 %" in page
    assert done.stdout.splitlines()[-2] == "Done."
    again = make(trimmed, "mirrored")
    assert again.stdout.splitlines()[0] == "Nothing to do: mirrored is up to date."


def test_unfinished_models(trimmed):
    done = make(trimmed, "unfinished")
    assert done.returncode == 0, done.stderr[-2000:]
    results = trimmed / "results" / "smoke"
    for figure in ("unfinished", "unfinished_courses", "unfinished_dead"):
        assert (results / "figures" / f"{figure}.png").is_file()
    page = (results / "html" / "unfinished.html").read_text()
    assert all(f"Figure {n}" in page for n in (1, 2, 3)) and "refitted" in page
