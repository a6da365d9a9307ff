"""The notebooks that measure time and memory, by the Makefile at smoke."""

import json

import pandas as pd
import pytest
import yaml
from conftest import ROOT, make

from alphaprune.provenance import read


@pytest.fixture(scope="module")
def measured(whole_project):
    done = make(whole_project, "time-and-memory", "how-cost-grows")
    assert done.returncode == 0, done.stderr[-2000:]
    return whole_project / "results" / "smoke"


@pytest.mark.parametrize("name", ["11_time_and_memory", "12_how_cost_grows"])
def test_the_parameters_are_those_of_quick(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    defaults = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
    given = {}
    exec("".join(defaults["source"]), given)
    del given["__builtins__"]
    for preset in ("quick", "report", "smoke"):
        file = yaml.safe_load((ROOT / "params" / preset / f"{name[3:]}.yaml").read_text())
        assert file.keys() == given.keys() and (preset != "quick" or file == given)


def test_time_and_memory(measured):
    table = pd.read_csv(measured / "time_and_memory.csv")
    assert set(table["network"]) == {"original", "pruned"} and set(table["batch"]) == {1, 16}
    assert (table[["milliseconds", "memory_average", "memory_peak", "images_per_second"]] > 0).all(axis=None)
    original, pruned = (table[table["network"] == n].reset_index() for n in ("original", "pruned"))
    for cost in ("file", "parameters", "multiply_adds"):
        assert (pruned[cost] < 0.5 * original[cost]).all()
    assert (original["faster"] == 1).all() and (table["memory_peak"] >= table["memory_average"]).all()
    assert (table["threads"] == 1).all()
    page = (measured / "html" / "time_and_memory.html").read_text()
    for name in ("original", "narrow", "no skips"):
        assert (
            f"not finished, so not compared: ResNet-20, {name}; `make skips PRESET=smoke` finishes it" in page
        )


def test_what_to_deploy_with(measured):
    for name in ("vgg-16", "resnet-18"):
        table = pd.read_csv(measured / f"deployment_{name}.csv")
        assert len(table) == 2 * 4 and table["way"].nunique() == 4
        pruned = table[table["network"] == "pruned"]
        assert (pruned["predicted"] > 5).all() and (pruned["faster_than_same"] > 0).all()
    bits = pd.read_csv(measured / "sixteen_bits.csv")
    assert list(bits["network"]) == ["original", "pruned"] and bits[["as it is", "bfloat16"]].le(1).all(
        axis=None
    )
    rounded = pd.read_csv(measured / "rounded_widths.csv").set_index("network")["predicted"]
    assert rounded["pruned, widths by sensitivity, round_to 2"] >= 0.99 * rounded["pruned"] > 5
    assert "a batch of images" in set(pd.read_csv(measured / "data_path.csv")["alternative"])


def test_how_cost_grows(measured):
    table = pd.read_csv(measured / "how_cost_grows.csv")
    assert list(table["axis"].unique()) == ["width", "keep_ratio", "depth", "image size"]
    plain = table[table["network"] == "plain"]
    for _, own in plain.groupby("axis"):
        assert own["predicted"].iloc[-1] == 1 and own["predicted"].is_monotonic_increasing
        assert own["time_share"].iloc[-1] == 1 and own["memory_share"].iloc[-1] == 1
    assert set(table["network"]) == {"plain", "at alpha 0"}
    sizes = plain[plain["axis"] == "image size"]
    assert sizes["predicted"].iloc[0] == pytest.approx(1 / 4, rel=0.05)


def test_figures_and_pages_say_what_they_were_made_from(measured):
    for figure, page in (
        ("time_and_memory", "time_and_memory"),
        ("deployment", "time_and_memory"),
        ("how_cost_grows", "how_cost_grows"),
    ):
        found = read(measured / "figures" / f"{figure}.png")
        assert f"params/smoke/{page}.yaml" in found["parameters"]
        assert any(c.endswith(f"-f params/smoke/{page}.yaml") for c in found["command"])  # no more is given
        text = (measured / "html" / f"{page}.html").read_text()
        assert "trusted" in text and "<img" in text
    recorded = [
        r["stage"]
        for run in read(measured / "figures" / "time_and_memory.png")["runs"]
        for r in run["records"]
    ]
    assert "pruned/folded" in recorded
