"""Every notebook through papermill at smoke, by the Makefile, as a user would run them."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import make

from alphaprune.provenance import read

PAGES = (
    "pretrain",
    "week_before",
    "earlier_run",
    "fig1",
    "section21",
    "fig2",
    "fig3",
    "fig4",
    "pruned",
    "figures",
)


@pytest.fixture(scope="module")
def reproduced(whole_project):
    done = make(whole_project, "reproduce-figures")
    assert done.returncode == 0, done.stderr[-2000:]
    return whole_project, done


def test_everything_is_made_and_the_paths_are_named(reproduced):
    folder, done = reproduced
    results = folder / "results" / "smoke"
    for figure in (
        "figure1",
        "figure2",
        "figure3",
        "figure4",
        "overview",
        "pruned",
        "pruned_dead",
        "pretraining",
    ):
        assert (results / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (results / "figures" / f"{figure}.svg").read_text()
    assert done.stdout.splitlines()[-4:] == [
        "Done.",
        "Report:    results/smoke/report.html",
        "Figures:   results/smoke/figures/",
        "Scorecard: results/smoke/scorecard.csv",
    ]
    assert re.search(
        r"\[fig4\] stage \d+/12 a0\.5-lr0\.001: epoch 1/1, train .*%, validation .*%, at most .* left",
        done.stdout,
    )
    assert not list(results.rglob("*.failed.ipynb")) and not list(results.rglob(".*.ipynb"))


def test_a_second_run_does_nothing_and_says_so(reproduced):
    folder, _ = reproduced
    hashes = folder / "results" / "smoke" / ".inputs"  # of what make reads, kept for itself

    def times():
        files = [p for p in (folder / "results").rglob("*") if p.is_file() and hashes not in p.parents]
        return {p: p.stat().st_mtime_ns for p in files}

    before = times()
    started = time.monotonic()
    done = make(folder, "reproduce-figures")
    assert done.returncode == 0 and done.stdout.startswith("Nothing to do: everything is up to date.")
    assert time.monotonic() - started < 3
    assert before == times()


def test_what_is_damaged_of_figures_tables_and_pages_is_named_and_made_again(reproduced):
    """One file each flipped, cut, emptied and deleted, and two swapped; then nothing is left to do."""
    folder, _ = reproduced
    results = folder / "results" / "smoke"
    figures = results / "figures"
    one, other = figures / "figure1.png", figures / "figure2.png"
    names = ("figures/figure4.png", "scorecard.csv", "figures/overview.svg", "html/fig2.html", "report.html")
    paths = {name: results / name for name in (*names, "figures/figure1.png", "figures/figure2.png")}
    before = {name: path.read_bytes() for name, path in paths.items()}
    flipped = bytearray(before["figures/figure4.png"])
    flipped[len(flipped) // 2] ^= 1
    paths["figures/figure4.png"].write_bytes(flipped)
    paths["scorecard.csv"].write_bytes(before["scorecard.csv"][:100])
    paths["html/fig2.html"].write_bytes(b"")
    paths["figures/overview.svg"].unlink()
    one.write_bytes(before["figures/figure2.png"])
    other.write_bytes(before["figures/figure1.png"])
    (results / ".seals" / "report.html.sha256").unlink()
    done = make(folder, "reproduce-figures")
    assert done.returncode == 0
    for name in paths:
        named = f"results/smoke/{name if name != 'report.html' else '.seals/report.html.sha256'}"
        assert len(re.findall(rf"{re.escape(named)} is (?:damaged|missing)", done.stderr)) == 1, done.stderr
    assert {name: path.read_bytes() for name, path in paths.items() if "html" not in name} == {
        name: content for name, content in before.items() if "html" not in name
    }
    assert len(paths["html/fig2.html"].read_bytes()) > 10_000
    assert "stage 1/" not in done.stdout  # from the records
    done = make(folder, "reproduce-figures")
    assert done.stdout.startswith("Nothing to do") and not done.stderr


def test_damaged_records_of_stages_are_named_and_trained_again_by_the_same_make(reproduced):
    """No notebook is old by its inputs then; the seal of each that was made from a record makes it so."""
    folder, _ = reproduced
    results = folder / "results" / "smoke"
    card = (results / "scorecard.csv").read_bytes()
    (weights,) = (results / "stages" / "fig3").glob("a0.0125-*/weights.safetensors")
    (history,) = (results / "stages" / "fig1").glob("a0.0125-lr0.001-*/history.csv")
    weights.write_bytes(weights.read_bytes()[:1000])
    history.unlink()
    done = make(folder, "reproduce-figures")
    assert done.returncode == 0
    for path, what in ((weights, "damaged"), (history, "missing")):
        assert f"alphaprune: {path.relative_to(folder)} is {what}; " in done.stderr
    trained = set(re.findall(r"\[(\w+)\] stage \d+/1 (\S+):", done.stdout))
    assert trained == {("fig3", "a0.0125-lr0.0001"), ("fig1", "a0.0125-lr0.001")}, done.stdout
    assert (results / "scorecard.csv").read_bytes() == card
    assert make(folder, "reproduce-figures").stdout.startswith("Nothing to do")


def test_scorecard_has_a_verdict_for_every_claim(reproduced):
    card = pd.read_csv(reproduced[0] / "results" / "smoke" / "scorecard.csv")
    assert len(card) >= 15
    assert set(card["verdict"]) <= {"reproduced", "not reproduced", "report left open"}
    assert card["ours"].notna().all()
    pruned = card.set_index("id").loc["pruned-same"]
    assert pruned["ours"] == 0 and pruned["verdict"] == "reproduced"


def test_pages_ask_no_other_host_and_describe_every_picture(reproduced):
    results = reproduced[0] / "results" / "smoke"
    for page in (results / "report.html", *(results / "html" / f"{name}.html" for name in PAGES)):
        text = page.read_text()
        loaded = re.findall(
            r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=[\"']([^\"']{0,60})", text
        )
        assert all(target.startswith("data:") for target in loaded), (page, loaded)
        assert not re.search(r"@import|url\(\s*[\"']?(?:https?:)?//|\bimport\(|fetch\(", text), page
        pictures = re.findall(r"<img\b[^>]*>", text)
        assert all(
            re.search(r'alt="[^"]{30,}"', picture) and "No description" not in picture for picture in pictures
        )
        assert "$$" not in text and "/site-packages/" not in text
    report = (results / "report.html").read_text()
    assert report.count("<img") == 6
    links = re.findall(r'href="(html/[^"]+)"', report)
    assert len(links) == len(PAGES) and all((results / link).is_file() for link in links)


def test_every_figure_and_page_leads_to_its_records(reproduced):
    folder, _ = reproduced
    results = folder / "results" / "smoke"
    carriers = [*results.rglob("*.png"), *results.rglob("*.svg"), *results.rglob("*.html")]
    assert len(carriers) == 2 * 15 + len(PAGES) + 1
    for carrier in carriers:
        found = read(carrier)
        records = [r for run in found["runs"] for r in run["records"]]
        assert records and found["command"] and all((folder / f).is_file() for f in found["parameters"])
        for named in records:
            record = json.loads((folder / named["path"]).read_text())
            assert record["identity"] == named["identity"], carrier
            assert record["lock_sha256"] and record["command"] and record["data_checksum"]
    folded = read(results / "figures" / "pruned.png")["runs"][0]["records"]
    assert [r["stage"] for r in (folded[0], *folded[-2:])] == [
        "pretrain/base",
        "fig4/a0-lr0.1",
        "pruned/folded",
    ]
    assert "stages_of" not in (results / "report.html").read_text().partition("<main>")[0]


def test_executed_notebooks_hold_the_parameters_given(reproduced):
    notebook = nbformat.read(reproduced[0] / "results" / "smoke" / "notebooks" / "fig2.ipynb", 4)
    (injected,) = [c for c in notebook.cells if "injected-parameters" in c.metadata.get("tags", [])]
    assert 'experiment = "fig2"' in injected.source


def test_an_experiment_runs_again_when_its_content_changes_alone_and_trains_nothing_again(reproduced):
    folder, _ = reproduced
    file = folder / "params" / "smoke" / "fig2.yaml"
    os.utime(file)  # as a checkout does
    assert make(folder, "fig2").stdout == "Notebook:  results/smoke/notebooks/fig2.ipynb\n"
    file.write_text(file.read_text() + "# a remark\n")
    done = make(folder, "fig2")
    assert done.returncode == 0 and "[fig2] 0 stages to train, 3 already recorded" in done.stdout
    assert "[fig1]" not in done.stdout


def test_papermill_takes_a_file_and_a_parameter(reproduced):
    folder, _ = reproduced
    command = [
        ".venv/bin/papermill",
        "notebooks/02_alpha_decay.ipynb",
        "out.ipynb",
        "-f",
        "params/smoke/fig1.yaml",
        "-p",
        "max_epochs",
        "2",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (folder / "results/smoke/figures/experiments/fig1,max_epochs=2.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "sed", "1"], "parameter 'sed' is unknown; did you mean 'seed'?"),
        (["-p", "keep_ratio", "1.5"], "keep_ratio"),
    ],
)
def test_a_failed_notebook_is_kept_under_another_name(reproduced, tmp_path, arguments, message):
    folder, _ = reproduced
    out = tmp_path / "out.ipynb"
    command = [
        ".venv/bin/python",
        "notebooks/execute.py",
        "notebooks/02_alpha_decay.ipynb",
        str(out),
        "-f",
        "params/smoke/fig1.yaml",
        *arguments,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert [p.name for p in Path(tmp_path).iterdir()] == ["out.failed.ipynb"]


def test_an_unknown_preset_is_named(reproduced):
    done = make(reproduced[0], "reproduce-figures", "PRESET=slow")
    assert done.returncode != 0 and "preset 'slow' is unknown; there are: " in done.stderr


def test_a_misspelt_target_is_named(reproduced):
    done = make(reproduced[0], "reproduce-figure")
    assert done.returncode != 0 and "nothing here makes 'reproduce-figure'; 'make help' lists" in done.stderr


def test_a_preset_in_small_letters_is_not_passed_over(reproduced):
    done = make(reproduced[0], "help", "preset=gpu")
    assert done.returncode != 0 and "preset=gpu is not read; write it in capitals" in done.stderr


def test_pretrain_trains_anew(reproduced):
    weights = reproduced[0] / "results" / "smoke" / "pretrained" / "vgg16.safetensors"
    (record,) = (reproduced[0] / "results" / "smoke" / "stages" / "pretrain").glob("*/run.json")
    before, content = record.stat().st_mtime_ns, weights.read_bytes()
    done = make(reproduced[0], "pretrain")
    assert record.stat().st_mtime_ns > before and weights.read_bytes() == content
    assert done.returncode == 0 and "[pretrain] 1 stage to train, 0 already recorded" in done.stdout
