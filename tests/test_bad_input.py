"""Bad input: parameter files, command lines, data, weights and records that are wrong, damaged or hostile.

Each row of the tables ends with one line on stderr and exit code 2, before anything is trained; none runs what it carries, none
writes outside results/. A damaged record is instead named, and what it recorded is made again.

Rows run in this process, since importing torch takes longer than all of them; `test_processes` runs some as a user does.
A row may take 5 s of this process's time; one that hangs fails. The random cases are few here; with ALPHAPRUNE_FAULTS=1,
as `make test-faults` sets it, they are 10,000.
"""

import contextlib
import datetime
import hashlib
import importlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings

import pytest
import torch
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from alphaprune import UsageError, data, yaml_text
from alphaprune.certificate import Certificate
from alphaprune.comparison import load_comparison
from alphaprune.comparison import main as compare_main
from alphaprune.data import Split
from alphaprune.errors import Damaged
from alphaprune.experiment import Experiment
from alphaprune.experiment import main as experiment_main
from alphaprune.image_folder import load_folder
from alphaprune.models import vgg16
from alphaprune.prune import prune
from alphaprune.pruned import load_pruned
from alphaprune.records import (
    SEAL,
    FinalRecord,
    FoldRecord,
    SensitivityRecord,
    StageRecord,
    read_history,
    read_record,
)
from alphaprune.scorecard import load_claims
from alphaprune.settings import Settings, load_settings
from alphaprune.storage import check_digest, json_bytes, load_tensors, read_digest, save_tensors, write_digest
from alphaprune.train import Recipe, fit

SECONDS = 5  # of a row
# What loads torch, or a notebook's kernel, may take that long too.
LOADING = {"weights that are a pickle": 20, "a notebook's path outside": 20}
BASE = "results/smoke/pretrained/vgg16.safetensors"
FIG4 = "params/smoke/fig4.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project whose smoke preset has a pretrained network, a Figure 4 of one stage at alpha 0, and that stage folded."""
    root = tmp_path_factory.mktemp("trained") / "project"
    shutil.copytree(ROOT / "params", root / "params")
    (root / "results").mkdir()
    pretrain = root / "params" / "smoke" / "pretrain.yaml"
    pretrain.write_text(pretrain.read_text().replace("max_epochs: 3", "max_epochs: 1"))
    (root / FIG4).write_text(yaml.safe_dump({"title": "t", "stages": [STAGE]}))
    (root / "params/smoke/pruned.yaml").write_text(yaml.safe_dump({"title": "t", "folds": "fig4/a0-lr0.01"}))
    Experiment("smoke", "pretrain", root).run(lambda line: None)
    Experiment("smoke", "fig4", root).run(lambda line: None)
    prune(Experiment("smoke", "pruned", root))
    return root


@pytest.fixture
def root(trained, tmp_path, monkeypatch):
    """A copy of it, beside a file that is nobody's business."""
    copied = shutil.copytree(trained, tmp_path / "project")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.yaml").write_text("title: secret\n")
    monkeypatch.chdir(copied)
    return copied


def snapshot(root):
    """Every file beside and in the project but for its results: path -> content."""
    files = (p for p in root.parent.rglob("*") if (root / "results") not in p.parents and p.is_file())
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def everything(folder):
    """Path -> content, but for locks, which are there as soon as something is about to run."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@contextlib.contextmanager
def in_time(seconds=SECONDS):
    """Fails what takes more than its time: of the processor's, since other work may share it; a hang, after a minute."""

    def hangs(*_):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    started = time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - started < seconds


def refused(root, capsys, run, message):
    """Run a command line that must end with one line, exit code 2 and nothing written."""
    outside, inside = snapshot(root), everything(root / "results")
    capsys.readouterr()
    with in_time(), pytest.raises(SystemExit) as ended:
        run()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert ended.value.code == 2, captured
    # argparse prints how a command is used before its line
    assert len([line for line in lines if not line.startswith(("usage:", " "))]) == 1, captured.err
    assert message in captured.err and "Traceback" not in captured.err, captured.err
    assert len(captured.err) < 3000
    assert snapshot(root) == outside and everything(root / "results") == inside


# ---- parameter files

STAGE = {"alpha": 0.0, "lr": 0.01, "from": "base"}
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))


def stage(**changed):
    return {"stages": [STAGE | changed]}


def schedule(**changed):
    return {"stages": [{"schedule": "step", "by": 0.5, "lr": 0.1, "from": "base"} | changed]}


FILES = {
    # values: each a dict is merged into a good file
    "title a list": ({"title": ["t"]}, "title"),
    "title of 10,000 characters": ({"title": "t" * 10_000}, "title"),
    "a date for a title": ({"title": datetime.date(2020, 1, 1)}, "title"),
    "width a text": ({"width": "wide"}, "width: 'wide' is text"),
    "width true": ({"width": True}, "width"),
    "width NaN": ({"width": float("nan")}, "width"),
    "width infinite": ({"width": float("inf")}, "width"),
    "width of a million": ({"width": 1e6}, "width"),
    "width negative": ({"width": -1.0}, "width"),
    "keep_ratio NaN": ({"keep_ratio": float("nan")}, "keep_ratio"),
    "momentum infinite": ({"momentum": float("-inf")}, "momentum"),
    "epochs of 2**62": ({"max_epochs": 2**62}, "max_epochs"),
    "batch of 2**40": ({"batch_size": 2**40}, "batch_size"),
    "more images than there are": ({"train_images": 10**8}, "lower train_images"),
    "a million threads": ({"threads": 10**6}, "threads"),
    "seed beyond 64 bits": ({"seed": 2**70}, "beyond 2**63"),
    "seed a float": ({"seed": 1.0}, "seed"),
    "seed a mapping": ({"seed": {"a": 1}}, "seed"),
    "lr_scale of 1e300": ({"lr_scale": 1e300}, "lr_scale"),
    "weight_decay NaN": ({"weight_decay": float("nan")}, "weight_decay"),
    "lr of 1e308": (stage(lr=1e308), "stages.0.lr"),
    "alpha of 2**62": (stage(alpha=2**62), "stages.0.alpha"),
    "alpha true": (stage(alpha=True), "stages.0.alpha"),
    "alpha a list": (stage(alpha=[0.5]), "stages.0.alpha"),
    "distill of 2": (stage(distill=2.0), "stages.0.distill"),
    "temperature of 1e300": (stage(temperature=1e300), "stages.0.temperature"),
    "match_logits negative": (stage(match_logits=-1.0), "stages.0.match_logits"),
    "draw unknown": (stage(draw="poisson"), "stages.0.draw"),
    "multiples of one ratio for all": ({"round_to": 8}, "round_to is for widths: sensitivity"),
    "multiples of ranked widths": ({"widths": "torch-pruning-l2", "round_to": 8}, "round_to is for widths: sensitivity"),
    "widths by another importance": ({"widths": "torch-pruning-taylor"}, "widths"),
    "power of damages that are not asked for": ({"damage_power": 0.5}, "damage_power is for widths: sensitivity"),
    "channels selected by norm for random branches": ({"select_by": "norm"}, "select_by is for init: select or least_squares"),
    "channels selected by norm for new random branches": (stage(refit="random") | {"select_by": "norm"}, "select_by is for init: select or least_squares"),
    "select_by unknown": ({"init": "select", "select_by": "size"}, "select_by"),
    "optimizer unknown": ({"optimizer": "adam"}, "optimizer"),
    "damage_power of 0": ({"widths": "sensitivity", "damage_power": 0}, "damage_power"),
    "alpha rises": (stage(alpha=0.5, alpha_from=0.2), "give a smaller alpha"),
    "alpha falls without branches": ({"stages": [{"lr": 0.1, "from": "base", "alpha_from": 1.0}]}, "give a smaller alpha"),
    "alpha falls over nothing": (stage(alpha=0.0, alpha_from=1.0, falls_over=0.0), "stages.0.falls_over"),
    "falls_over alone": (stage(falls_over=0.3), "give that too"),
    "alpha falls in a stage that may end early": (stage(alpha=0.0, alpha_from=1.0), "set lr_schedule: one_cycle"),
    "colour unknown": (stage(color="no-such-colour"), "stages.0.color"),
    "a number for a key": ({"stages": [{**STAGE, 7: 8}]}, "stages.0"),
    "stages nested wrong": ({"stages": [[STAGE]]}, "stages.0"),
    "stages null": ({"stages": None}, "stages must be a list"),
    "501 stages": ({"stages": [STAGE | {"name": f"s{i}"} for i in range(501)]}, "501"),
    "a chain of 400 stages, the last first, to nowhere": (
        {"stages": [STAGE | {"name": f"s{i}", "from": f"s{i + 1}"} for i in range(400)]}, "has no stage 's400'"),
    "schedule of 10 million steps": (schedule(by=1e-7), "more than"),
    "schedule that never falls": (schedule(schedule="exponential", by=1e-12), "more than"),
    "schedule by NaN": (schedule(by=float("nan")), "stages.0.by"),
    "schedule of 5,000 values": (schedule(schedule="listed", by=[0.5] * 5000), "stages.0.by"),
    "schedule's threshold 2": (schedule(threshold=2.0), "stages.0.threshold"),
    "adaptive by steps of 0": ({"adaptive": {"lr": 0.1, "from": "a0-lr0.01", "first": 0.0}}, "adaptive.first"),
    "adaptive from nowhere": ({"adaptive": {"lr": 0.1, "from": "nobody"}}, "has no stage 'nobody'"),
    "adaptive a list": ({"adaptive": [1]}, "adaptive"),
    # names and paths
    "name with a path": (stage(name="../../outside/x"), "stages.0.name"),
    "name absolute": (stage(name="/x"), "stages.0.name"),
    "name in Unicode": (stage(name="ähnlich"), "stages.0.name"),
    "name of right-to-left override": (stage(name="a\u202eb"), "stages.0.name"),
    "name with NUL": (stage(name="a\0b"), "stages.0.name"),
    "name with a line end": (stage(name="a\nb"), "stages.0.name"),
    "name empty": (stage(name=""), "stages.0.name"),
    "name of 300 characters": (stage(name="n" * 300), "stages.0.name"),
    "name of two dots": (stage(name=".."), "stages.0.name"),
    "parent a path": (stage(**{"from": "../../outside/secret"}), "stages.0.from"),
    "parent absolute": (stage(**{"from": "/outside/secret"}), "stages.0.from"),
    "parent of two slashes": (stage(**{"from": "a/b/c"}), "stages.0.from"),
    "base outside": ({"base": "../outside/x.safetensors"}, "base"),
    "base outside by a detour": ({"base": "results/../../outside/x.safetensors"}, "base"),
    "base absolute": ({"base": "/outside/x.safetensors"}, "base"),
    "base in params": ({"base": "params/smoke/x.safetensors"}, "base"),
    "base results": ({"base": "results"}, "base"),
    "publish outside": ({"publish": "../outside"}, "publish"),
    "publish outside by a detour": ({"publish": "results/smoke/../../../outside"}, "publish"),
    "publish in lib": ({"publish": "lib/alphaprune"}, "publish"),
    "publish with a backslash": ({"publish": "results\\..\\x"}, "publish"),
    "publish a number": ({"publish": 7}, "publish"),
    "folds a path": ({"folds": "../../outside/x"}, "folds"),
    "folds a stage of nobody": ({"folds": "nobody/a0"}, "experiment 'nobody' is unknown"),
    "stages_of a path": ({"stages_of": "../../outside"}, "stages_of"),
    "stages_of a list": ({"stages_of": ["report"]}, "stages_of"),
    "stages_of empty": ({"stages_of": ""}, "stages_of"),
    "experiment elsewhere": ({"experiment": "../../outside/x"}, "must be 'smoke' and 'fig4'"),
    # cycles
    "own parent": (stage(name="x", **{"from": "x"}), "starts from itself"),
    "a circle of three": (
        {"stages": [STAGE | {"name": n, "from": p} for n, p in ("ab", "bc", "ca")]}, "starts from itself"),
    # YAML
    "billion laughs": (LAUGHS, "more than 10000 values"),
    "billion laughs by merges": (MERGES, "more than 10000 values"),
    "an anchor in itself": ("title: &a [*a]\n", "holds itself"),
    "30,000 brackets": ("title: " + "[" * 30_000, "nested deeper"),
    "10,000 dashes": ("- " * 10_000, "nested deeper"),
    "10 MB": ("title: " + "x" * 10_000_000, "larger than 64 KiB"),
    "20,000 values": ("title: [" + "1," * 20_000 + "]", "more than 10000 values"),
    "duplicate key": ("title: a\ntitle: b\n", "'title' stands twice"),
    "duplicate key in a stage": ("title: t\nstages: [{lr: 0.1, lr: 0.2, from: base}]\n", "'lr' stands twice"),
    "two documents": ("title: t\n---\ntitle: u\n", "not readable YAML"),
    "undefined alias": ("title: *nobody\n", "not readable YAML"),
    "not UTF-8": (b"title: \xff\xfe\n", "not readable YAML"),
    "UTF-16": ("title: t\n".encode("utf-16"), "not readable YAML"),
    "NUL bytes": (b"\0" * 100, "not readable YAML"),
    "a pickle": (pickle.dumps({"title": "t"}), "not readable YAML"),
    "no such date": ("title: 2020-99-99\n", "not readable YAML"),
    "a number of 5,000 digits": ("seed: " + "9" * 5000, "not readable YAML"),
    "a number of 20,000 hexadecimal digits": ("seed: 0x" + "f" * 20_000, "beyond 2**63"),
    "hexadecimal of nothing": ("seed: 0x_", "not readable YAML"),
    "a list for a key": ("? [a, b]\n: c\n", "not readable YAML"),
    "empty": ("", "must hold parameters"),
    "a list": ("- 1", "must hold parameters"),
    "escape sequences in a key": ('"\\e]0;x\\a\\n": 1\n', "is unknown"),
    "a key of 10,000 characters": ("k" * 1000 + ": 1\n", "is unknown"),
}  # fmt: skip


def put(root, content):
    file = root / FIG4
    if isinstance(content, dict):
        content = yaml.safe_dump({"title": "t", "stages": [STAGE]} | content, allow_unicode=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("name", FILES)
def test_parameter_files(root, capsys, name):
    content, message = FILES[name]
    put(root, content)
    refused(root, capsys, lambda: experiment_main([FIG4]), message)


class Evil:
    """Makes a marker where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


TAGS = [
    '!!python/object/apply:os.mkdir ["{marker}"]',
    "!!python/object/new:os.mkdir ['{marker}']",
    "!!python/name:os.system ''",
    "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('{marker}')\"]",
    "!!python/module:antigravity ''",
    "!!binary aGE=",
    "!<tag:yaml.org,2002:python/object/apply:os.mkdir> ['{marker}']",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_make_nothing(root, capsys, tag):
    marker = root.parent / "marker"
    text = f"title: {tag.replace('{marker}', str(marker))}\n"
    with contextlib.suppress(Exception):  # the payload is one: yaml's unsafe loader runs it
        yaml.unsafe_load(text)
    if marker.exists():
        marker.rmdir()
    put(root, text)
    refused(root, capsys, lambda: experiment_main([FIG4]), "the tag")
    refused(root, capsys, lambda: experiment_main([FIG4, "--set", text.replace(": ", "=", 1)]), "the tag")
    with pytest.raises(UsageError, match="the tag"):
        load_claims(root / FIG4)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [("a pipe", "no regular file"), ("a folder", "no regular file"), ("a device", "no regular file")],
)
def test_what_is_no_file(root, capsys, place, message):
    preset = root / "params" / "smoke" / "preset.yaml"
    preset.unlink()
    if place == "a pipe":
        os.mkfifo(preset)
    elif place == "a folder":
        preset.mkdir()
    else:
        preset.symlink_to("/dev/zero")
    refused(root, capsys, lambda: experiment_main([FIG4]), message)


def test_a_circle_through_other_files(root, capsys):
    for name, parent in (("fig1", "fig2"), ("fig2", "fig1")):
        (root / "params" / "smoke" / f"{name}.yaml").write_text(
            yaml.safe_dump({"title": "t", "stages": [STAGE | {"name": "x", "from": f"{parent}/x"}]})
        )
    refused(root, capsys, lambda: experiment_main(["params/smoke/fig1.yaml"]), "starts from itself")


@pytest.mark.parametrize("name", ["ünï", "a b", "a;b", ".hidden", "-x"])
def test_names_of_files(root, capsys, name):
    shutil.copy(root / FIG4, root / "params" / "smoke" / f"{name}.yaml")
    refused(root, capsys, lambda: experiment_main([f"params/smoke/{name}.yaml"]), "experiment")


def test_a_link_to_another_project_is_not_followed_there(root, capsys):
    """Its results would be written beside the file that the link leads to."""
    other = shutil.copytree(root, root.parent / "other")
    link = root / "params" / "smoke" / "linked.yaml"
    link.symlink_to(other / "params" / "quick" / "fig4.yaml")
    refused(
        root,
        capsys,
        lambda: experiment_main(["params/smoke/linked.yaml"]),
        "params/report/linked.yaml does not",
    )


# ---- command lines

COMMANDS = {
    "nothing": ([], "required"),
    "unknown option": ([FIG4, "--jobs", "2"], "unrecognized"),
    "two files, one missing": ([FIG4, "params/smoke/fig5.yaml", "--why"], "fig5.yaml does not exist"),
    "no file": (["params/smoke/nobody.yaml"], "does not exist"),
    "a folder": (["params/smoke"], "does not exist"),
    "a file of no preset": (["params/claims.yaml"], "no experiment file"),
    "a file outside": (["../outside/secret.yaml"], "no experiment file"),
    "a file too near the root": (["/etc/hostname"], "no experiment file"),
    "a preset's file": (["params/smoke/preset.yaml"], "experiment 'preset' is unknown"),
    "NUL in a name": (["params/smoke/a\0b.yaml"], "does not exist"),
    "unknown parameter": ([FIG4, "--set", "kep_ratio=0.5"], "did you mean 'keep_ratio'"),
    "root elsewhere": ([FIG4, "--set", "root=../outside"], "parameter 'root' is unknown"),
    "self": ([FIG4, "--set", "self=1"], "parameter 'self' is unknown"),
    "another preset": ([FIG4, "--set", "preset=quick"], "parameter 'preset' is unknown"),
    "another experiment": ([FIG4, "--set", "experiment=../x"], "parameter 'experiment' is unknown"),
    "no name": ([FIG4, "--set", "=1"], "parameter '' is unknown"),
    "no value": ([FIG4, "--set", "seed"], "write NAME=VALUE"),
    "seed infinite": ([FIG4, "--set", "seed=.inf"], "seed"),
    "seed of 5,000 digits": ([FIG4, "--set", "seed=" + "9" * 5000], "not a YAML value"),
    "NaN": ([FIG4, "--set", "keep_ratio=.nan"], "keep_ratio"),
    "laughs": ([FIG4, "--set", f"title={LAUGHS}"], "not a YAML value"),
    "brackets": ([FIG4, "--set", "stages=" + "[" * 5000], "nested deeper"),
    "publish outside": ([FIG4, "--set", "publish=../outside"], "publish"),
    "base outside": ([FIG4, "--set", "base=/outside/x"], "base"),
    "bytes that are no text": ([FIG4, "--set", "title=\udcff"], "not a YAML value"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines(root, capsys, name):
    arguments, message = COMMANDS[name]
    refused(root, capsys, lambda: experiment_main(arguments), message)


COMPARISONS = {
    "a path": (["../../outside/secret", "smoke"], {}, "name is"),
    "an absolute path": (["/outside/secret", "smoke"], {}, "name is"),
    "a name of nobody": (["nobody", "smoke"], {}, "nobody.yaml"),
    "a preset's path": (["controls", "../outside"], {}, "preset '../outside' is unknown"),
    "a method of nobody": (["controls", "smoke", "--method", "x" * 5000], {}, "is unknown"),
    "keep_ratio NaN": (["controls", "smoke", "--keep-ratio", "nan"], {}, "keep_ratio is nan"),
    "keep_ratio 0": (["controls", "smoke", "--keep-ratio", "0"], {}, "keep_ratio is 0.0"),
    "seed negative": (["controls", "smoke", "--seed", "-1"], {}, "seed is -1"),
    "seed a word": (["controls", "smoke", "--seed", "x"], {}, "invalid int"),
    "no jobs": (["controls", "smoke", "--jobs", "0"], {}, "jobs is 0"),
    "a million jobs": (["controls", "smoke", "--jobs", "1000000"], {}, "jobs is 1000000"),
    "a file: lrs infinite": (["controls", "smoke"], {"lrs": [float("inf")]}, "lrs.0"),
    "a file: lrs a text": (["controls", "smoke"], {"lrs": "0.1"}, "lrs"),
    "a file: lrs empty": (["controls", "smoke"], {"lrs": []}, "lrs"),
    "a file: first_lr NaN": (["controls", "smoke"], {"first_lr": float("nan")}, "first_lr"),
    "a file: keep_ratio 2": (["controls", "smoke"], {"keep_ratios": [2.0]}, "keep_ratios.0"),
    "a file: seed negative": (["controls", "smoke"], {"seeds": [-5]}, "seeds.0"),
    "a file: budget infinite": (["controls", "smoke"], {"budgets": [float("inf")]}, "budgets.0"),
    "a file: methods a list": (["controls", "smoke"], {"methods": [1]}, "methods"),
    "a file: no methods": (["controls", "smoke"], {"methods": {}}, "methods"),
    "a file: stages empty": (["controls", "smoke"], {"methods": {"m": {"stages": []}}}, "methods.m.stages"),
    "a file: a parent of nobody": (
        ["controls", "smoke"], {"methods": {"m": {"stages": [STAGE | {"from": "nobody"}]}}}, "nobody"),
    "a file: settings with a root": (
        ["controls", "smoke"], {"methods": {"m": {"stages": [STAGE], "settings": {"root": "../outside"}}}}, "'root' is unknown"),
    "a file: settings that publish outside": (
        ["controls", "smoke"], {"methods": {"m": {"stages": [STAGE], "settings": {"publish": "../outside"}}}}, "publish"),
    "a file: laughs": (["controls", "smoke"], LAUGHS, "more than 10000 values"),
    "a file: a list": (["controls", "smoke"], "- 1", "controls.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(root, capsys, name):
    arguments, changed, message = COMPARISONS[name]
    file = root / "params" / "controls.yaml"
    file.write_text(
        changed
        if isinstance(changed, str)
        else yaml.safe_dump(yaml.safe_load(file.read_text()) | changed, sort_keys=False)
    )
    refused(root, capsys, lambda: compare_main(arguments), message)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"method,seed\na,b\n", b"x" * 1000, b'"', b"\0\0,\n1"])
def test_a_damaged_table_of_a_comparison(root, capsys, content):
    table = root / "results" / "smoke" / "controls.csv"
    table.write_bytes(content)
    refused(
        root, capsys, lambda: compare_main(["controls", "smoke", "--seed", "0"]), "controls.csv is damaged"
    )


def execute(root, *arguments):
    """notebooks/execute.py in this process."""
    module = importlib.import_module("execute")
    notebook = str(ROOT / "notebooks" / "02_alpha_decay.ipynb")
    raise SystemExit(module.main([notebook, str(root / "results" / "out.ipynb"), *arguments]))


NOTEBOOKS = {
    "no file": (["-f", "nobody.yaml"], "nobody.yaml"),
    "laughs": (LAUGHS, "more than 10000 values"),
    "a list": ("- 1", "must hold parameters"),
    "a tag": ("x: !!python/object/apply:os.getpid []", "the tag"),
    "code for a name": ("'import os; os.mkdir(\"marker\") #': 1", "is no name of a parameter"),
    "code for a name on the command line": (["-p", "x=1;__import__('os').mkdir('marker')#", "1"], "is no name"),
    "a keyword": (["-p", "import", "os"], "is no name"),
    "a builtin": (["-p", "globals", "1"], "is no name"),
    "a private name": (["-p", "__name__", "x"], "is no name"),
    "a number for a name": ("1: 2", "is no name"),
    "a name in Unicode": (["-p", "ﬁg", "1"], "is no name"),
    "no YAML": (["-p", "seed", "["], "not a YAML value"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_of_notebooks(root, capsys, name):
    arguments, message = NOTEBOOKS[name]
    if isinstance(arguments, str):
        (root / FIG4).write_text(arguments)
        arguments = ["-f", FIG4]
    refused(root, capsys, lambda: execute(root, *arguments), message)
    assert not (root / "marker").exists()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"preset": "smoke"}, "are missing"),
        ({"preset": "../outside", "experiment": "secret"}, "preset '../outside' is unknown"),
        ({"preset": "smoke", "experiment": "../../outside/secret"}, "is unknown in preset 'smoke'"),
        ({"preset": ["smoke"], "experiment": {"a": 1}}, "is unknown"),
        ({"preset": "smoke", "experiment": "fig4", "root": "../outside"}, "parameter 'root' is unknown"),
        ({"preset": "smoke", "experiment": "fig4", "self": 1}, "parameter 'self' is unknown"),
        ({"preset": "smoke", "experiment": "fig4", "seed": 10**5000}, "seed"),
        ({"preset": "smoke", "experiment": "fig4", "stages": [10**5000]}, "stages.0"),
        ({"preset": "smoke", "experiment": "fig4", "title": "\x1b[2J" * 100}, "title"),
    ],
)
def test_parameters_in_notebooks(root, parameters, message):
    before = snapshot(root)
    with in_time(), pytest.raises(UsageError, match=message) as caught:
        Experiment.from_notebook(parameters, set())
    assert str(caught.value).isprintable() and snapshot(root) == before


# ---- data sets


def batch(label, images=10_000):
    return (bytes([label]) + bytes(3072)) * images


DATA = {
    "nothing there": {},
    "a label out of range": {"data_batch_1.bin": batch(11)},
    "labels of another set": {"data_batch_1.bin": batch(3)},
    "a batch cut off": {"data_batch_1.bin": batch(1)[:-1]},
    "a batch of one image": {"data_batch_1.bin": batch(1, 1)},
    "empty": {"data_batch_1.bin": b""},
    "images of another shape": {"data_batch_1.bin": (b"\0" + bytes(3 * 28 * 28)) * 10_000},
    "larger than a batch": {"data_batch_1.bin": batch(1, 10_001)},
    "a pickle, as CIFAR-10 for Python is": {"data_batch_1.bin": "pickle"},
    "a folder": {"data_batch_1.bin": None},
}


@pytest.mark.parametrize("name", DATA)
def test_data_sets(root, capsys, monkeypatch, name):
    folder = root.parent / "cache" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    monkeypatch.setenv("ALPHAPRUNE_DATA", str(folder.parent))
    for file, content in DATA[name].items():
        if content is None:
            (folder / file).mkdir()
        elif content == "pickle":
            (folder / file).write_bytes(pickle.dumps({b"data": Evil(root.parent / "marker")}))
        else:
            (folder / file).write_bytes(content)
    put(root, {"data": "cifar10"})
    refused(root, capsys, lambda: experiment_main([FIG4]), "make data")


def test_places_of_data_that_are_none(root, capsys, monkeypatch):
    put(root, {"data": "cifar10"})
    monkeypatch.setenv("ALPHAPRUNE_DATA", "~nobody-of-that-name/x")
    refused(root, capsys, lambda: experiment_main([FIG4]), "names no folder")
    refused(root, capsys, lambda: data.main([]), "names no folder")
    monkeypatch.setenv("ALPHAPRUNE_DATA", str(root / FIG4))
    refused(root, capsys, lambda: data.main([]), "cannot be written")
    refused(root, capsys, lambda: data.main(["cifar100"]), "unrecognized")


def test_a_source_that_sends_something_else(root, capsys, monkeypatch):
    def sends(folder):
        for name in data.CIFAR10:
            (folder / name).write_bytes(pickle.dumps(Evil(root.parent / "marker")))
        return folder

    cache = root / "results" / "cache"
    cache.mkdir()
    monkeypatch.setenv("ALPHAPRUNE_DATA", str(cache))
    monkeypatch.setattr(data, "_from_archive", sends)
    monkeypatch.setattr(data, "_from_npm", sends)
    refused(root, capsys, lambda: data.main([]), "is not the official one")


def png(width, height, lies=None):
    """A PNG's bytes; `lies` is the size that its header claims."""
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, "PNG")
    content = bytearray(out.getvalue())
    if lies:
        import zlib

        content[16:24] = struct.pack(">II", *lies)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


PICTURES = {
    "no image": b"hello",
    "a pickle": pickle.dumps([1]),
    "cut off": png(64, 64)[:60],
    "claims 60,000 x 60,000 pixels": png(8, 8, (60_000, 60_000)),
    "claims no pixels": png(8, 8, (0, 0)),
    "1 x 20,000 pixels": png(1, 20_000),
    "empty": b"",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path, name):
    for where in ("cat", "dog"):
        (tmp_path / where).mkdir()
        for i in range(4):
            (tmp_path / where / f"{i}.png").write_bytes(png(16, 16))
    (tmp_path / "cat" / "bad.png").write_bytes(PICTURES[name])
    before = everything(tmp_path)
    with in_time(), warnings.catch_warnings(), pytest.raises(UsageError, match=r"bad\.png") as caught:
        warnings.simplefilter("ignore")
        load_folder(tmp_path, 64)
    assert "\n" not in str(caught.value) and everything(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [{"size": 0}, {"size": -3}, {"size": 10**9}, {"size": 32.5}, {"size": "32"}, {"held_out": float("nan")},
     {"held_out": 1.0}, {"held_out": "0.2"}, {"held_out": True}, {"folder": 7}, {"folder": "a\0b"}, {"folder": "nobody"}],
)  # fmt: skip
def test_arguments_of_a_folder_of_pictures(tmp_path, arguments):
    with in_time(), pytest.raises(UsageError):
        load_folder(**{"folder": tmp_path, "size": 32} | arguments)


SPLITS = {
    "a label out of range": (lambda x, y: (x, y + 7), "labels go from 7 to 16, but the network tells 10"),
    "a label below 0": (lambda x, y: (x, y - 1), "labels go from -1"),
    "more classes than the network": (lambda x, y: (x, y * 100), "labels go from 0 to 900"),
    "labels as float32": (lambda x, y: (x, y.float()), "labels are torch.float32"),
    "too few labels": (lambda x, y: (x, y[:-1]), "labels are"),
    "images as float32": (lambda x, y: (x.float(), y), "images are torch.float32"),
    "grey images": (lambda x, y: (x[:, :1], y), "images are torch.uint8"),
    "one image": (lambda x, y: (x[0], y), "images are torch.uint8"),
    "images of 8 x 8": (lambda x, y: (x[..., :8, :8], y), "do not fit the network"),
    "no images": (lambda x, y: (x[:0], y[:0]), "no images"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_images_and_labels_that_do_not_fit_the_network(tmp_path, name):
    change, message = SPLITS[name]
    good = Split(
        torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(10).repeat_interleave(2)
    )
    model, recipe = vgg16(0.03125), Recipe(0.1, max_epochs=1, batch_size=4)
    for bad_first in (True, False):
        with in_time(), pytest.raises(UsageError, match=message):
            bad = Split(*change(good.images, good.labels))
            splits = (bad, good) if bad_first else (good, bad)
            fit(model, *splits, recipe, "key", tmp_path / "resume.safetensors")
    assert list(tmp_path.iterdir()) == []


# ---- weights

HUGE = struct.pack("<Q", 2**62)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def changed_weights(change):
    state = {k: v.clone() for k, v in vgg16(0.125).state_dict().items()}
    change(state)
    return save(state)


def set_nan(state):
    state["features.0.weight"][0] = float("nan")


WEIGHTS = {
    "a pickle": (lambda marker: pickle.dumps(Evil(marker)), "not a readable safetensors"),
    "a file of torch.save": (lambda marker: torch_file(Evil(marker)), "not a readable safetensors"),
    "empty": (lambda _: b"", "not a readable safetensors"),
    "seven bytes": (lambda _: b"\0" * 7, "not a readable safetensors"),
    "a header of 2**62 bytes": (lambda _: HUGE + b"{}", "not a readable safetensors"),
    "a header longer than the file": (lambda _: struct.pack("<Q", 1000) + b"{}", "not a readable safetensors"),
    "a header that is no JSON": (lambda _: struct.pack("<Q", 4) + b"[[[[", "not a readable safetensors"),
    "a header of nested lists": (lambda _: struct.pack("<Q", 40_000) + b"[" * 40_000, "not a readable safetensors"),
    "overlapping tensors": (lambda _: header(a=entry(), b=entry(offsets=(4, 12))) + bytes(12), "not a readable safetensors"),
    "a hole between tensors": (lambda _: header(a=entry(), b=entry(offsets=(12, 20))) + bytes(20), "not a readable safetensors"),
    "offsets beyond the end": (lambda _: header(a=entry(offsets=(0, 800), shape=(200,))) + bytes(8), "not a readable safetensors"),
    "offsets the wrong way round": (lambda _: header(a=entry(offsets=(8, 0))) + bytes(8), "not a readable safetensors"),
    "a shape that does not fit its bytes": (lambda _: header(a=entry(shape=(1000,))) + bytes(8), "not a readable safetensors"),
    "a shape of 2**40 x 2**40": (lambda _: header(a=entry(shape=(2**40, 2**40))) + bytes(8), "not a readable safetensors"),
    "a negative shape": (lambda _: header(a=entry(shape=(-2,))) + bytes(8), "not a readable safetensors"),
    "an unknown dtype": (lambda _: header(a=entry(dtype="F31")) + bytes(8), "not a readable safetensors"),
    "a lying dtype": (lambda _: header(a=entry(dtype="I64", shape=(1,))) + bytes(8), "is in only one of them"),
    "cut off": (lambda _: changed_weights(lambda s: None)[:-100], "not a readable safetensors"),
    "another width": (lambda _: save(vgg16(0.25).state_dict()), "do not fit a vgg16 of width 0.125"),
    "other class counts": (lambda _: save(vgg16(0.125, classes=100).state_dict()), "do not fit a vgg16"),
    "a tensor missing": (lambda _: changed_weights(lambda s: s.popitem()), "is in only one of them"),
    "a tensor more": (lambda _: changed_weights(lambda s: s.update(x=torch.zeros(1))), "is in only one of them"),
    "float64": (lambda _: save({k: v.double() for k, v in vgg16(0.125).state_dict().items()}), "torch.float64"),
    "NaN": (lambda _: changed_weights(set_nan), "NaN"),
    "no tensors": (lambda _: save({}), "is in only one of them"),
}  # fmt: skip


def torch_file(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(root, capsys, name):
    """Their checksum is right: whoever can put a file there can put one beside it."""
    content, message = WEIGHTS[name]
    marker = root.parent / "marker"
    file = root / BASE
    file.write_bytes(content(marker))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_name(file.name + ".sha256").write_text(f"{digest}  {file.name}\n")
    refused(root, capsys, lambda: experiment_main([FIG4]), message)
    assert not marker.exists()


def test_the_payloads_would_run_where_pickles_are_loaded(tmp_path):
    for content, load in (
        (pickle.dumps(Evil(tmp_path / "marker")), pickle.loads),
        (torch_file(Evil(tmp_path / "marker")), lambda c: torch.load(io.BytesIO(c), weights_only=False)),
    ):
        load(content)
        (tmp_path / "marker").rmdir()


CHECKSUMS = {
    "empty": b"",
    "too short": b"abc",
    "of another file": b"0" * 64 + b"  vgg16.safetensors\n",
    "not hexadecimal": b"z" * 64,
    "not UTF-8": b"\xff" * 200,
    "a folder": None,
    "10 MB": b"0" * 10_000_000,
}


def harm_checksum(root, name):
    beside = root / f"{BASE}.sha256"
    beside.unlink()
    if CHECKSUMS[name] is None:
        beside.mkdir()
    else:
        beside.write_bytes(CHECKSUMS[name])


@pytest.mark.parametrize("name", CHECKSUMS)
def test_checksums(root, capsys, name):
    """With no record to say whether the weights or their checksum are damaged."""
    (root / BASE).with_name("run.json").unlink()
    shutil.rmtree(root / "results" / "smoke" / "stages" / "pretrain")
    harm_checksum(root, name)
    refused(root, capsys, lambda: experiment_main([FIG4]), "safetensors")


@pytest.mark.parametrize("name", [n for n in CHECKSUMS if CHECKSUMS[n] is not None])
def test_checksums_that_a_record_makes_good(root, capsys, name):
    before = (root / f"{BASE}.sha256").read_bytes()
    harm_checksum(root, name)
    said = run_fig4(root, capsys)
    assert "vgg16.safetensors.sha256 was damaged" in said and "0 stages to train" in said
    assert (root / f"{BASE}.sha256").read_bytes() == before


@pytest.mark.parametrize("name", ["missing", "a folder"])
def test_weights_that_are_not_there(root, capsys, name):
    shutil.rmtree(
        root / "results" / "smoke" / "stages" / "pretrain"
    )  # from which they would be published again
    (root / BASE).unlink()
    if name == "a folder":
        (root / BASE).mkdir()
    put(root, stage(lr=0.02))
    refused(root, capsys, lambda: experiment_main([FIG4]), "is missing")


# ---- records: a damaged one is named, and what it recorded is trained again

FIRST, LAST = b'"metrics"', b'"weights_sha256"'


def record(**changed):
    """A change of a record's content; None removes a key."""

    def change(content):
        found = json.loads(content) | changed
        return json.dumps({k: v for k, v in found.items() if v is not None}).encode()

    return change


RECORDS = {
    "empty": lambda c: b"",
    "not JSON": lambda c: c[: len(c) // 2],
    "binary": lambda c: os.urandom(500),
    "not UTF-8": lambda c: c.replace(b"fig4", b"\xff\xfe\xfd\xfc"),
    "a pickle": lambda c: pickle.dumps(json.loads(c)),
    "a list": lambda c: b"[]",
    "a number": lambda c: b"1",
    "null": lambda c: b"null",
    "NaN": lambda c: b"NaN",
    "nested 100,000 deep": lambda c: b"[" * 100_000,
    "a key twice": lambda c: c.rstrip()[:-1] + b', "identity": "x"}',
    "a number of 10,000 digits": lambda c: c.rstrip()[:-1] + b', "more": ' + b"9" * 10_000 + b"}",
    "no identity": record(identity=None),
    "identity a list": record(identity=["x"]),
    "identity in Unicode": record(identity="ü" * 64),
    "no metrics": record(metrics=None),
    "metrics a list": record(metrics=[1]),
    "metrics empty": record(metrics={}),
    "accuracy a text": record(metrics={"val_accuracy": "0.9"}),
    "accuracy of 5": record(metrics={"val_accuracy": 5.0}),
    "accuracy NaN": lambda c: c.replace(b'"val_accuracy": ', b'"val_accuracy": NaN, "x": '),
    "accuracy 1e999": lambda c: c.replace(b'"val_accuracy": ', b'"val_accuracy": 1e999, "x": '),
    "another metric nested": record(metrics={"val_accuracy": 0.5, "fold_now": {"a": 1}}),
    "no outcome": record(outcome=None),
    "outcome a text": record(outcome="good"),
    "no steps": record(outcome={"epochs": 1, "images": 1, "seconds": 1.0, "diverged": False}),
    "steps negative": record(outcome={"epochs": 1, "steps": -1, "images": 1, "seconds": 1.0, "diverged": False}),
    "steps true": record(outcome={"epochs": 1, "steps": True, "images": 1, "seconds": 1.0, "diverged": False}),
    "no checksum of the weights": record(weights_sha256=None),
}  # fmt: skip


def csv(old, new):
    return lambda c: c.replace(old, new, 1)


HISTORIES = {
    "empty": lambda c: b"",
    "only the columns": lambda c: c.splitlines()[0] + b"\n",
    "binary": lambda c: b"\xff\xfe\0\0" * 100,
    "NUL": lambda c: b"\0" * 1000,
    "another table": lambda c: b"a,b\n1,2\n",
    "a column missing": lambda c: c.replace(b",value", b"", 1),
    "a value missing": lambda c: c.rstrip().rpartition(b",")[0] + b",\n",
    "a value NaN": lambda c: c.rstrip().rpartition(b",")[0] + b",nan\n",
    "a value infinite": lambda c: c.rstrip().rpartition(b",")[0] + b",inf\n",
    "a value of 1e999": lambda c: c.rstrip().rpartition(b",")[0] + b",1e999\n",
    "a value a word": lambda c: c.rstrip().rpartition(b",")[0] + b",good\n",
    "a value too many": lambda c: c.rstrip() + b",1,2,3\n",
    "of another stage": csv(b"fig4,a0-lr0.01", b"fig4,a0-lr0.02"),
    "of another experiment": csv(b"fig4,", b"fig3,"),
    "an open quote": lambda c: c + b'"',
    "an epoch of 10**30": lambda c: c.replace(b",1,val", b"," + b"9" * 30 + b",val"),
    "an epoch negative": lambda c: c.replace(b",1,val", b",-1,val"),
    "missing": None,
    "a folder": "folder",
}


def run_fig4(root, capsys):
    with in_time(60):
        experiment_main([FIG4])
    return capsys.readouterr().out


def damage(file, change):
    content = file.read_bytes()
    if change is None or change == "folder":
        file.unlink()
        if change == "folder":
            file.mkdir()
    else:
        assert change(content) != content
        file.write_bytes(change(content))
    return content


def as_before(content):
    """A record without the checksums that would give any change away: as it was written before there were any."""
    old = {k: v for k, v in json.loads(content).items() if k not in (*SEAL, "history_sha256")}
    return json_bytes(old)


@pytest.mark.parametrize(
    ("file", "name"), [("run.json", n) for n in RECORDS] + [("history.csv", n) for n in HISTORIES]
)
def test_a_damaged_record_is_named_by_whoever_asks(root, file, name):
    (folder,) = (root / "results" / "smoke" / "stages" / "fig4").glob("a0-lr0.01-*")
    (folder / "run.json").write_bytes(as_before((folder / "run.json").read_bytes()))
    assert Experiment("smoke", "fig4", root).record("a0-lr0.01") is not None
    damage(folder / file, {"run.json": RECORDS, "history.csv": HISTORIES}[file][name])
    before = everything(root)
    with in_time():
        experiment = Experiment("smoke", "fig4", root)
        why = experiment.why(experiment.stages[0])
        assert "\n" not in why and f"{file} is damaged" in why
        assert experiment.record("a0-lr0.01") is None and experiment.history().empty
        assert experiment.summary().empty and len(experiment.stage_table()) == 1
        with pytest.raises(UsageError):
            experiment.model("a0-lr0.01")
    assert everything(root) == before


@pytest.mark.parametrize(
    ("file", "name"), [("run.json", "nested 100,000 deep"), ("run.json", "no metrics"), ("history.csv", "a value NaN"), ("history.csv", "binary")]
)  # fmt: skip
def test_what_a_damaged_record_recorded_is_trained_again(root, capsys, file, name):
    (folder,) = (root / "results" / "smoke" / "stages" / "fig4").glob("a0-lr0.01-*")
    weights, history = ((folder / n).read_bytes() for n in ("weights.safetensors", "history.csv"))
    damage(folder / file, {"run.json": RECORDS, "history.csv": HISTORIES}[file][name])
    assert f"{file} is damaged" in run_fig4(root, capsys)
    assert (folder / "weights.safetensors").read_bytes() == weights
    assert (folder / "history.csv").read_bytes() == history
    assert "0 stages to train, 1 already recorded" in run_fig4(root, capsys)


FOLDS = {
    "not JSON": lambda c: c[:100],
    "no certificate": record(certificate=None),
    "certificate a list": record(certificate=[]),
    "certificate empty": record(certificate={}),
    "layers nested wrong": lambda c: c.replace(b'"layers": [', b'"layers": [[[[]]],', 1),
    "dtype of nobody": lambda c: c.replace(b'"dtype": "float32"', b'"dtype": "__class__"'),
    "no table": record(table=None),
    "table of numbers": record(table=[1, 2]),
    "accuracy NaN": lambda c: c.replace(b'"test_accuracy": ', b'"test_accuracy": NaN, "x": ', 1),
}


@pytest.mark.parametrize("name", FOLDS)
def test_damaged_records_of_folding(root, name):
    (file,) = (root / "results" / "smoke" / "stages" / "pruned").glob("folded-*/run.json")
    experiment = Experiment("smoke", "pruned", root)
    file.write_bytes(as_before(file.read_bytes()))
    assert load_pruned(experiment).certificate.exact
    damage(file, FOLDS[name])
    with in_time(), pytest.warns(UserWarning, match=r"run\.json is damaged"):
        assert load_pruned(experiment) is None


def test_a_damaged_record_of_folding_is_made_again(root):
    (file,) = (root / "results" / "smoke" / "stages" / "pruned").glob("folded-*/run.json")
    experiment = Experiment("smoke", "pruned", root)
    before = load_pruned(experiment)
    damage(file, FOLDS["no certificate"])
    with pytest.warns(UserWarning, match="it is folded again"):
        again = prune(experiment)
    assert again.certificate == before.certificate and again.table.equals(before.table)


@pytest.mark.parametrize("file", ["run.json", "history.csv"])
def test_damaged_records_of_published_weights(root, file):
    pretrain = Experiment("smoke", "pretrain", root)
    assert pretrain.published_is_current() and len(pretrain.published())
    (root / "results" / "smoke" / "pretrained" / file).write_bytes(b"{\xff")
    with pytest.warns(UserWarning, match=f"{file} is damaged"):
        assert pretrain.published() is None
    if file == "run.json":
        with pytest.warns(UserWarning, match=f"{file} is damaged"):
            assert not pretrain.published_is_current()
    pretrain.run(lambda line: None)
    assert pretrain.published_is_current() and len(pretrain.published())


def test_published_weights_that_git_does_not_have_are_shown_from_their_records(root):
    pretrain = Experiment("smoke", "pretrain", root)
    before = pretrain.published()
    shutil.rmtree(root / "results" / "smoke" / "stages" / "pretrain")
    (root / BASE).unlink()
    with pytest.warns(UserWarning, match="vgg16.safetensors is missing; what is recorded of it is shown"):
        assert pretrain.published().equals(before)
    with (root / "results" / "smoke" / "pretrained" / "history.csv").open("a") as history:
        history.write("\n")
    with pytest.raises(UsageError, match=r"vgg16\.safetensors is missing; bring them back"):
        pretrain.published()


def test_an_experiment_that_publishes_nothing_says_so(root):
    for ask in (Experiment.published, Experiment.published_is_current):
        with pytest.raises(UsageError, match="publishes nothing"):
            ask(Experiment("smoke", "fig4", root))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"identity": 1}', {"damages": {}}, {"damages": {"features.0": {"0.35": 0.1}}}, {"damages": {"x": {"0.1": 1}}},
     {"damages": {"features.0": {}}}, {"damages": {"features.0": {"nan": 1.0}}}, {"damages": []}, {"seconds": "long"}],
)  # fmt: skip
def test_damaged_records_of_sensitivity(root, monkeypatch, content):
    measured = []

    def measures(network, seen):
        measured.append(len(seen))
        names = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)]
        return {n: {0.12: 1.0, 0.5: 0.1} for n in names}

    monkeypatch.setattr("alphaprune.layer_widths.damages", measures)
    given = {"widths": "sensitivity", "init_images": 32}
    good = Experiment("smoke", "fig4", root, **given).stages[0].identity
    (file,) = (root / "results" / "smoke" / "sensitivity").glob("*.json")
    whole = json.loads(file.read_text())
    file.write_bytes(
        content if isinstance(content, bytes) else as_before(json.dumps(whole | content).encode())
    )
    with in_time(10), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            assert Experiment("smoke", "fig4", root, **given).stages[0].identity == good
        except UsageError as e:
            assert "of other layers" in str(e)  # whole, but for another network
        else:
            assert any("is damaged" in str(w.message) for w in caught) and len(measured) == 2


def test_multiples_that_are_too_coarse_are_no_fault_of_the_record(root, monkeypatch):
    monkeypatch.setattr(
        "alphaprune.layer_widths.damages",
        lambda network, seen: {
            n: {0.12: 1.0, 0.5: 0.1} for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)
        },
    )
    with pytest.raises(UsageError, match=r"fig4, keep_ratio 0\.1: round_to=8 is too coarse") as said:
        Experiment("smoke", "fig4", root, widths="sensitivity", init_images=32, round_to=8, keep_ratio=0.1)
    assert "delete" not in str(said.value)


STATES = {
    "no state": lambda s: "",
    "not JSON": lambda s: s[:40],
    "a list": lambda s: "[]",
    "nested": lambda s: "[" * 100_000,
    "NaN": lambda s: s.replace('"lowest_loss": ', '"lowest_loss": NaN, "x": '),
    "no outcome": lambda s: json.dumps({k: v for k, v in json.loads(s).items() if k != "outcome"}),
    "outcome of more": lambda s: s.replace('"best_epoch"', '"evil": 1, "best_epoch"'),
    "epochs negative": lambda s: s.replace('"epochs": ', '"epochs": -'),
    "history of numbers": lambda s: json.dumps(json.loads(s) | {"outcome": json.loads(s)["outcome"] | {"history": [1]}}),
    "scheduler of nobody": lambda s: json.dumps(json.loads(s) | {"scheduler": {"__class__": 1}}),
    "scheduler's numbers as text": lambda s: s.replace('"last_epoch": ', '"last_epoch": "x", "y": '),
    "two learning rates": lambda s: json.dumps(json.loads(s) | {"lr": [0.1, 0.1]}),
    "a learning rate as text": lambda s: json.dumps(json.loads(s) | {"lr": ["0.1"]}),
}  # fmt: skip
TENSORS = {
    "a tensor missing": lambda t: t.pop("best/features.0.weight"),
    "a tensor of another network": lambda t: t.update({"model/x": torch.zeros(1)}),
    "a shape": lambda t: t.update({"best/features.0.weight": torch.zeros(1)}),
    "a dtype": lambda t: t.update({k: v.double() for k, v in t.items() if k.startswith("model/")}),
    "momentum of nobody": lambda t: t.update({"momentum/999": torch.zeros(1)}),
    "momentum of a word": lambda t: t.update({"momentum/x": torch.zeros(1)}),
    "no tensors": lambda t: t.clear(),
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A resume state after one epoch of two, and what the two give."""
    folder = tmp_path_factory.mktemp("interrupted")

    def run(path, **stop):
        torch.manual_seed(0)
        model = vgg16(0.03125)
        sample = data.load("sample")
        recipe = Recipe(0.05, max_epochs=2, batch_size=32)
        outcome = fit(model, sample.train.first(64), sample.val.first(20), recipe, "key", path, **stop)
        return outcome.history, model.state_dict()

    def stop(outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder / "resume.safetensors", after_epoch=stop)
    return folder / "resume.1.safetensors", run, run(folder / "other.safetensors")


@pytest.mark.parametrize("name", [*STATES, *TENSORS])
def test_a_damaged_resume_state_begins_the_stage_again(interrupted, tmp_path, name):
    path, run, (history, weights) = interrupted
    tensors, metadata = load_tensors(path)
    if name in STATES:
        changed = STATES[name](metadata["state"])
        assert changed != metadata["state"]
        metadata = {"state": changed}
    else:
        TENSORS[name](tensors)
    save_tensors(tmp_path / "resume.1.safetensors", tensors, metadata)
    with (
        in_time(20),
        pytest.warns(UserWarning, match=r"resume\.1\.safetensors: .* goes on from the state before"),
    ):
        again, state = run(tmp_path / "resume.safetensors")
    assert again == history and all(torch.equal(state[k], v) for k, v in weights.items())


def test_an_undamaged_resume_state_is_used(interrupted, tmp_path):
    path, run, (history, _) = interrupted
    for file in path.parent.glob("resume.*"):
        shutil.copy(file, tmp_path)
    epochs = []
    again, _ = run(tmp_path / "resume.safetensors", after_epoch=lambda outcome: epochs.append(outcome.epochs))
    assert epochs == [2] and again == history


# ---- as a user runs them

PROCESSES = {
    "no such file": (["-m", "alphaprune.experiment", "params/smoke/nobody.yaml"], "does not exist"),
    "an option of nobody": (["-m", "alphaprune.experiment", FIG4, "--jobs", "2"], "unrecognized"),
    "a misspelt parameter": (["-m", "alphaprune.experiment", FIG4, "--set", "kep_ratio=0.5"], "did you mean 'keep_ratio'"),
    "another root": (["-m", "alphaprune.experiment", FIG4, "--set", "root=/x"], "parameter 'root' is unknown"),
    "a value out of range": (["-m", "alphaprune.experiment", FIG4, "--set", "keep_ratio=2.0"], "keep_ratio"),
    "a path outside": (["-m", "alphaprune.experiment", FIG4, "--set", "publish=../outside"], "publish"),
    "a YAML bomb": (["-m", "alphaprune.experiment", FIG4, "--set", f"title={LAUGHS}"], "not a YAML value"),
    "a file with a tag": ("title: !!python/object/apply:os.getpid []\n", "the tag"),
    "a circle of stages": (yaml.safe_dump({"title": "t", "stages": [STAGE | {"name": "x", "from": "x"}]}), "starts from itself"),
    "a parent of nobody": (yaml.safe_dump({"title": "t", "stages": [STAGE | {"from": "nobody"}]}), "has no stage 'nobody'"),
    "a comparison's path": (["-m", "alphaprune.comparison", "../../outside/secret", "smoke"], "name is '../../outside/secret'"),
    "a figure that is none": (["-m", "alphaprune.provenance", FIG4], "is neither PNG"),
    "a notebook's parameter that is code": (
        ["EXECUTE", "NOTEBOOK", "results/out.ipynb", "-p", "x=__import__('os').mkdir('marker')#", "1"], "is no name"),
    # Found wrong by the notebook, in its kernel.
    "a notebook's path outside": (
        ["EXECUTE", "NOTEBOOK", "results/out.ipynb", "-f", FIG4, "-p", "preset", "smoke", "-p", "experiment", "fig4", "-p", "base", "../x"],
        "base"),
    # Found wrong when it is loaded, for which torch is.
    "weights that are a pickle": (["-m", "alphaprune.experiment", FIG4], "not a readable safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSES)
def test_processes(root, name, fault):
    arguments, message = PROCESSES[name]
    if isinstance(arguments, str):
        (root / FIG4).write_text(arguments)
        arguments = ["-m", "alphaprune.experiment", FIG4]
    if name == "weights that are a pickle":
        content = pickle.dumps(Evil(root.parent / "marker"))
        (root / BASE).write_bytes(content)
        write_digest(root / BASE, hashlib.sha256(content).hexdigest())
    places = {
        "EXECUTE": str(ROOT / "notebooks" / "execute.py"),
        "NOTEBOOK": str(ROOT / "notebooks" / "02_alpha_decay.ipynb"),
    }
    before, busy = snapshot(root), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *(places.get(a, a) for a in arguments)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = now.ru_utime - busy.ru_utime + now.ru_stime - busy.ru_stime
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("usage:", " "))]
    assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
    assert snapshot(root) == before
    # Of the processor's, since other work may share it; one that is alone is as fast by the clock.
    assert seconds < LOADING.get(name, SECONDS)
    fault(f"as a command: {name}", 1, f"one line, exit code 2, {seconds:.1f} s of the processor's")


# ---- random cases: whatever is read, it is taken or refused in one line

CASES = 10_000 if os.environ.get("ALPHAPRUNE_FAULTS") == "1" else 300


def cases(share):
    """A share, in percent, of all random cases."""
    return settings(
        max_examples=CASES * share // 100,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=CASES == 300,
    )


# Values that have broken readers of parameters before, among any others.
odd = st.sampled_from(
    ["", "..", "../x", "/x", "a/b", "\0", "\u202e", "é", "nan", "1e-3", "base", "scratch", "fig4/a0-lr0.01", "best", "results/x",
     0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), True, None, [], {}]
)  # fmt: skip
scalars = odd | st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip

stage_keys = st.sampled_from(["name", "alpha", "lr", "from", "train_wide", "distill", "draw", "order", "narrow", "refit", "color",
                              "schedule", "by", "threshold", "colors", "alongside", "alpha_from", "falls_over", "zzz"])  # fmt: skip
stages = st.lists(
    st.dictionaries(stage_keys, values, max_size=3).map(lambda d: STAGE | d) | values, max_size=3
)


@pytest.fixture(scope="module")
def fuzzed(trained):
    before = everything(trained)
    yield trained
    assert everything(trained) == before  # nothing that was read wrote


readings = []  # of random cases, by what was made of them


def taken_or_refused(read):
    """Whatever a reader raises must be a UsageError of one printable line."""
    readings.append("refused")
    try:
        found = read()
        readings[-1] = "taken"
        return found
    except UsageError as e:
        assert str(e) and str(e).isprintable() and len(str(e)) < 2100
        return None


@cases(20)
@given(
    st.dictionaries(st.sampled_from([*Settings.model_fields, "stages_of", "x"]), values, max_size=4), stages
)
@example({"stages_of": 10**5000}, [])
def test_any_parameters(fuzzed, given_values, given_stages):
    found = taken_or_refused(
        lambda: load_settings("smoke", "fig4", fuzzed, **{"stages": given_stages} | given_values)
    ) if {"preset", "experiment"}.isdisjoint(given_values) else None  # fmt: skip
    if found is not None:
        assert found.base.startswith("results/") and ".." not in found.base.split("/")
        assert all("/" not in s.name for s in found.stages)
        taken_or_refused(
            lambda: Experiment("smoke", "fig4", fuzzed, **{"stages": given_stages} | given_values)
        )


yaml_text_of_pieces = st.lists(
    st.sampled_from(
        ["title", "stages", "lr", ": ", ": ", "\n", "\n  ", "- ", "[", "]", "{", "}", ",", "&a ", "*a", "<<", "!!int ", "!x ", "'", '"', "|\n",
         ">", "? ", "#", "%", "@", "`", "---\n", "...\n", "0x_", "0b_", "1:60:60", "2020-13-01", "2001-01-01t99:99:99", ".inf", ".nan", "~",
         "1_", "=", "é", "\t", "\ufeff", "\x85", "0o7", "1e5", "9" * 40]
    ) | st.text(max_size=4),
    max_size=20,
).map("".join)  # fmt: skip


@cases(20)
@given(yaml_text_of_pieces)
def test_any_text_as_a_parameter_file(fuzzed, text):
    def read():
        try:
            return yaml_text.parse(text)
        except ValueError as e:
            raise UsageError(str(e) or "?") from None

    found = taken_or_refused(read)
    json.dumps(found, default=str, skipkeys=True)  # plain values only


def test_what_was_read_can_be_changed_and_is_read_again_as_it_was():
    text = "a: [{b: 1}, 2]"
    yaml_text.parse(text)["a"][0]["b"] = 3
    assert yaml_text.parse(text) == {"a": [{"b": 1}, 2]}


@cases(10)
@given(st.binary(max_size=200) | yaml_text_of_pieces.map(str.encode))
def test_any_bytes_as_a_file(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp() / "bytes"
    (root / "params" / "smoke").mkdir(parents=True, exist_ok=True)
    (root / "results").mkdir(exist_ok=True)
    for file in ("smoke/preset.yaml", "smoke/fig4.yaml", "claims.yaml", "controls.yaml"):
        (root / "params" / file).write_bytes(content.encode() if isinstance(content, str) else content)
    taken_or_refused(lambda: load_settings("smoke", "fig4", root))
    taken_or_refused(lambda: load_claims(root / "params" / "claims.yaml"))
    taken_or_refused(lambda: load_comparison("controls", root))


@cases(5)
@given(
    st.dictionaries(
        st.sampled_from(["lrs", "first_lr", "seeds", "keep_ratios", "budgets", "methods", "x"]), values
    )
)
def test_any_comparison(tmp_path_factory, content):
    root = tmp_path_factory.getbasetemp() / "comparisons"
    (root / "params").mkdir(parents=True, exist_ok=True)
    good = {"lrs": [0.1], "first_lr": 0.1, "seeds": [0], "keep_ratios": [0.5], "methods": {"m": {"stages": [STAGE]}}}  # fmt: skip
    try:
        text = yaml.safe_dump(good | content, allow_unicode=True)
    except (ValueError, yaml.YAMLError):
        return
    (root / "params" / "controls.yaml").write_text(text, encoding="utf-8", errors="replace")
    taken_or_refused(lambda: load_comparison("controls", root))


FORMS = {"run.json": StageRecord, "folded.json": FoldRecord, "damages.json": SensitivityRecord, "final.json": FinalRecord}  # fmt: skip


@pytest.fixture(scope="module")
def good_records(fuzzed):
    (stage,) = (fuzzed / "results" / "smoke" / "stages" / "fig4").glob("*/run.json")
    (folded,) = (fuzzed / "results" / "smoke" / "stages" / "pruned").glob("*/run.json")
    return {
        "run.json": as_before(stage.read_bytes()).decode(),
        "folded.json": as_before(folded.read_bytes()).decode(),
        "damages.json": json.dumps({"identity": "0" * 64, "damages": {"a": {"0.5": 1.0}}, "seconds": 1.0}),
        "final.json": json.dumps({"params": 1, "macs": 1, "test_accuracy": 1.0}),
        "history.csv": stage.with_name("history.csv").read_text(),
    }


def places(value, path=()):
    """Where values stand in a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def put_at(value, path, new):
    if not path:
        return new
    copied = value.copy()
    copied[path[0]] = put_at(value[path[0]], path[1:], new)
    return copied


@cases(20)
@given(st.data())
def test_any_change_of_a_record(good_records, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "record.json"
    name = data.draw(st.sampled_from(sorted(FORMS)))
    good = json.loads(good_records[name])
    changed = put_at(good, data.draw(st.sampled_from(list(places(good)))), data.draw(values))
    try:
        file.write_text(json.dumps(changed, skipkeys=True), errors="replace")
    except ValueError:  # a number of too many digits
        return
    if (found := taken_or_refused(lambda: read_record(file, FORMS[name]))) is None:
        return
    if name == "folded.json":
        certificate = Certificate.from_record(found["certificate"])
        assert isinstance(certificate.exact, bool) and str(certificate)
    if name == "run.json":
        assert 0 <= found["metrics"]["val_accuracy"] <= 1 and found["outcome"]["steps"] >= 0


@cases(10)
@given(st.data())
def test_any_bytes_in_a_record(good_records, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "bytes.record"
    content = bytearray(good_records[data.draw(st.sampled_from(sorted(good_records)))].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=10))
    file.write_bytes(content)
    for form in FORMS.values():
        taken_or_refused(lambda form=form: read_record(file, form))
    taken_or_refused(lambda: read_history(file))
    digest = file.with_name("bytes.record.sha256")
    digest.write_bytes(content[:100])
    taken_or_refused(lambda: read_digest(file))
    taken_or_refused(lambda: check_digest(file))


@cases(10)
@given(st.data())
def test_any_bytes_in_a_history(good_records, tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "history.csv"
    rows = [line.split(",") for line in good_records["history.csv"].splitlines()[:6]]
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        row[data.draw(st.integers(0, len(row) - 1))] = data.draw(
            st.sampled_from(
                ["", "nan", "inf", "1e999", "9" * 40, "-1", '"', "\0", "True", "1_0", "0x1", " 1", "\r"]
            )
            | st.text(max_size=5)
        )
    file.write_text("\n".join(",".join(row) for row in rows), errors="replace")
    table = taken_or_refused(lambda: read_history(file))
    if table is not None:
        assert table["value"].abs().lt(float("inf")).all() and (table["epoch"] >= 0).all()


@cases(5)
@given(st.data())
def test_any_bytes_as_weights(tmp_path_factory, data):
    """With a right checksum: none is loaded but as a safetensors file."""
    file = tmp_path_factory.getbasetemp() / "x.safetensors"
    content = bytearray(header(a=entry(), b=entry(offsets=(8, 16))) + bytes(16))
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    file.write_bytes(content)
    write_digest(file, hashlib.sha256(content).hexdigest())
    found = taken_or_refused(lambda: load_tensors(file))
    assert found is None or all(isinstance(t, torch.Tensor) for t in found[0].values())


def test_a_damaged_record_is_a_usage_error():
    assert issubclass(Damaged, UsageError)


@pytest.mark.skipif(CASES == 300, reason="counted in the whole form")
def test_so_many_random_cases_were_read(fault):
    assert len(readings) >= CASES
    assert (
        min(readings.count("taken"), readings.count("refused")) > CASES // 10
    )  # neither all good nor all bad
    fault(
        "random parameters, files, records, histories and weights",
        CASES,
        "taken, or refused in one line; none ends otherwise",
    )
