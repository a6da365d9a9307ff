"""From a figure to what it was made from."""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from matplotlib.figure import Figure
from papermill.cli import papermill

from alphaprune import plots
from alphaprune.errors import UsageError
from alphaprune.experiment import Experiment
from alphaprune.provenance import as_text, changed_parameters, main, merged, papermill_command, read


def record(folder: Path, stage: str, **changed) -> dict:
    run = {
        "commit": "abc",
        "lock_sha256": "1" * 64,
        "data_checksum": "2" * 64,
        "hardware": {"gpu": None},
        "versions": {},
    }
    names = [{"stage": f"fig4/{stage}", "identity": stage * 8, "path": f"results/{stage}/run.json"}]
    return {
        "command": ["make it"],
        "parameters": [f"params/{stage}.yaml"],
        "runs": [run | changed | {"records": names}],
    }


@pytest.fixture
def trained(project) -> Experiment:
    (project / "requirements.lock").write_text("torch==1\n")
    run = Experiment("smoke", "pretrain", root=project, max_epochs=1, train_images=64)
    run.run(lambda line: None)
    return run


def test_a_figure_leads_to_its_records_and_what_made_them(trained, tmp_path):
    plots.save(Figure(), tmp_path / "figure", "Nothing.", trained.provenance())
    for ending in ("png", "svg"):
        found = read(tmp_path / f"figure.{ending}")
        (run,) = found["runs"]
        (made,) = run["records"]
        on_disk = json.loads((trained.root / made["path"]).read_text())
        assert made["stage"] == "pretrain/base" and made["identity"] == on_disk["identity"]
        assert run["lock_sha256"] == hashlib.sha256(b"torch==1\n").hexdigest() == on_disk["lock_sha256"]
        assert run["data_checksum"] == on_disk["data_checksum"]
        assert run["hardware"]["threads"] == 1 and run["versions"]["torch"]
        assert found["command"] == [on_disk["command"]]
        assert found["parameters"] == ["params/smoke/preset.yaml", "params/smoke/pretrain.yaml"]
        assert all((trained.root / file).is_file() for file in found["parameters"])
        assert str(trained.root) not in json.dumps(found)


def test_the_command_makes_the_very_same_record(trained):
    words = shlex.split(trained.command)
    assert words[:4] == ["python", "-m", "alphaprune.experiment", "params/smoke/pretrain.yaml"]
    given = dict(word.split("=", 1) for word in words[5::2])
    again = Experiment(
        "smoke", "pretrain", root=trained.root, **{k: yaml.safe_load(v) for k, v in given.items()}
    )
    assert again.stages[-1].identity == trained.stages[-1].identity


def test_the_command_says_only_what_differs_from_the_files(project, trained):
    weights = trained.folder(trained.stages[-1]) / "weights.safetensors"
    base = weights.relative_to(project).as_posix()
    stages = [{"alpha": 0.5, "lr": 1e-4, "from": "base"}]
    run = Experiment("smoke", "fig4", root=project, base=base, seed=0, lr_scale=1e-5, stages=stages)
    assert run.command == (
        f"python -m alphaprune.experiment params/smoke/fig4.yaml --set base={base} --set lr_scale=1.0e-05 "
        "--set 'stages=[{alpha: 0.5, lr: 0.0001, from: base}]'"
    )


def test_papermill_reads_the_command_of_a_notebook_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "parameters.yaml"
    file.write_text("same: 1\nnumber: 1\nflag: false\nnothing: 1\nplaces: [1]\ntext: a\nof_digits: a\n")
    ran = {"same": 1, "number": 0.5, "flag": True, "nothing": None, "places": [8, 16], "text": "as it is", "of_digits": "12", "other": 3}  # fmt: skip
    changed = changed_parameters(ran, file)
    assert changed == {k: v for k, v in ran.items() if k not in ("same", "other")}
    words = shlex.split(papermill_command("11_time_and_memory", "parameters.yaml", changed))
    assert words[:5] == [
        "papermill",
        "notebooks/11_time_and_memory.ipynb",
        "out.ipynb",
        "-f",
        "parameters.yaml",
    ]
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    monkeypatch.chdir(tmp_path)
    papermill(["--prepare-only", *words[1:]], standalone_mode=False)
    cells = json.loads((tmp_path / "out.ipynb").read_text())["cells"]
    injected = next(c for c in cells if "injected-parameters" in c["metadata"].get("tags", []))
    taken = {}
    exec("".join(injected["source"]), taken)
    assert {k: taken[k] for k in ran if k != "other"} == {k: v for k, v in ran.items() if k != "other"}


def test_parents_and_other_experiments_are_named(trained, project):
    run = Experiment(
        "smoke",
        "fig1",
        root=project,
        base=f"{trained.folder(trained.stages[0]).relative_to(project)}/weights.safetensors",
    )
    found = run.provenance()
    assert "params/smoke/week_before.yaml" in found["parameters"]  # which fig1 starts from
    assert "params/report/fig1.yaml" in found["parameters"]  # which holds its stages
    assert [r["stage"] for r in found["runs"][0]["records"]] == [
        "pretrain/base"
    ]  # nothing else is recorded yet


def test_the_same_records_give_the_same_files(trained, tmp_path):
    for name in ("a", "b"):
        plots.save(Figure(), tmp_path / name, "Nothing.", trained.provenance())
    for ending in ("png", "svg"):
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_records_of_one_commit_and_machine_are_one_run():
    a, b, c = record(Path(), "a"), record(Path(), "b"), record(Path(), "c", commit="def")
    found = merged([a, b, c, a])
    assert [(r["commit"], len(r["records"])) for r in found["runs"]] == [("abc", 2), ("def", 1)]
    assert found["command"] == ["make it"]
    assert found["parameters"] == ["params/a.yaml", "params/b.yaml", "params/c.yaml"]


def test_the_command_line_prints_it_for_people(tmp_path, capsys):
    plots.save(Figure(), tmp_path / "figure", "Nothing.", record(tmp_path, "a"))
    main([str(tmp_path / "figure.png")])
    printed = capsys.readouterr().out
    for line in (
        "command     make it",
        "commit      abc",
        "parameters  params/a.yaml",
        "  fig4/a  aaaaaaaa  results/a/run.json",
    ):
        assert line in printed.splitlines()
    assert "\x1b" not in as_text(record(tmp_path, "a", commit="\x1b[31m"))


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    plots.save(Figure(), tmp_path / "figure", "Nothing.", record(tmp_path, "a"))
    shown = (
        f"{sys.executable} -m alphaprune.provenance {tmp_path / 'figure.png'} | true; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.png", None),
        ("none.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        ("none.html", b"<html><meta name='author' content='x'>"),
        ("other.html", b"<html><meta name='provenance' content='{&quot;runs&quot;: 3}'>"),
        ("deep.html", b"<meta name='provenance' content='" + b"[" * 100_000 + b"'>"),
        ("broken.png", b"\x89PNG\r\n\x1a\n\x00\x00"),
        ("broken.svg", b"<svg"),
        ("missing.png", b""),
        ("figure.txt", b"text"),
    ],
)
def test_a_file_without_is_refused_in_one_line(tmp_path, capsys, name, content):
    file = tmp_path / name
    if content is None:
        Figure().savefig(file)
    elif name != "missing.png":
        file.write_bytes(content)
    with pytest.raises(UsageError):
        read(file)
    with pytest.raises(SystemExit) as stopped:
        main([str(file)])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert len(printed.err.splitlines()) == 1 and str(file) in printed.err
