"""Experiment files: complete and typed before anything runs; every error names file, key and remedy."""

import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from alphaprune import UsageError
from alphaprune.experiment import Experiment
from alphaprune.settings import load_settings

PRESETS = ("smoke", "quick", "gpu", "report")
EXPERIMENTS = (
    "pretrain",
    "week_before",
    "earlier_run",
    "fig1",
    "section21",
    "fig2",
    "fig3",
    "fig4",
    "pruned",
)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_file_is_valid_and_complete(preset, experiment):
    settings = load_settings(preset, experiment, ROOT)
    assert settings.stages or settings.folds


def test_presets_train_the_reports_stages_and_ratio():
    for experiment in EXPERIMENTS[1:]:
        reports, *others = (load_settings(p, experiment, ROOT) for p in ("report", "quick", "gpu", "smoke"))
        assert all(o.stages == reports.stages and o.keep_ratio == 0.34375 for o in others)
    report = load_settings("report", "fig4", ROOT)
    assert (report.width, report.train_images, report.patience, report.max_epochs, report.lr_scale) == (
        1.0,
        None,
        25,
        400,
        1.0,
    )


def test_two_presets_pretrain_alike_each_for_itself():
    gpu, report = (load_settings(p, "pretrain", ROOT) for p in ("gpu", "report"))
    assert (gpu.publish, report.publish) == ("results/gpu/pretrained", "results/report/pretrained")
    same = gpu.model_dump() | {"preset": "report", "publish": report.publish, "base": report.base}
    shared = set(same) - {"max_epochs", "patience", "fold_now_every"}
    assert gpu.recipe(gpu.stages[0]) == report.recipe(report.stages[0])
    assert all(same[k] == report.model_dump()[k] for k in shared)


def test_the_last_weights_are_kept_where_the_end_is_known():
    assert load_settings("smoke", "pretrain", ROOT, keep="last").keep == "last"
    with pytest.raises(UsageError, match="keep: last is for lr_schedule: one_cycle"):
        load_settings("smoke", "pretrain", ROOT, keep="last", lr_schedule="plateau")


def test_a_plain_end_belongs_to_a_known_number_of_changed_epochs():
    given = {"augment": "trivial", "augment_until": 0.5, "lr_schedule": "one_cycle"}
    settings = load_settings("smoke", "pretrain", ROOT, **given | {"max_epochs": 4})
    recipe = settings.recipe(settings.stages[0])
    assert [recipe.augment_in(epoch) for epoch in (1, 2, 3, 4)] == ["trivial", "trivial", "crop", "crop"]
    settings = load_settings("smoke", "pretrain", ROOT, **given | {"augment_until": 0.29, "max_epochs": 100})
    recipe = settings.recipe(settings.stages[0])
    assert [recipe.augment_in(epoch) for epoch in (29, 30)] == ["trivial", "crop"]  # 0.29 * 100 < 29
    for other in ({"augment": "crop"}, {"augment": "mirror"}, {"lr_schedule": "plateau"}):
        with pytest.raises(
            UsageError, match="augment_until is for augment: trivial and lr_schedule: one_cycle"
        ):
            load_settings("smoke", "pretrain", ROOT, **given | other)


def test_figure_4_has_the_reports_stages():
    stages = load_settings("quick", "fig4", ROOT).stages
    assert [(s.alpha, s.lr) for s in stages] == [(round(1 - i / 10, 1), 1e-3) for i in range(1, 11)] + [
        (0, 1e-2),
        (0, 1e-1),
    ]
    assert all(s.train_wide for s in stages)
    assert [s.parent for s in stages[-2:]] == ["a0-lr0.001", "a0-lr0.01"]


def put(project, **changed):
    """Write a changed fig4.yaml in the smoke preset."""
    path = project / "params" / "smoke" / "fig4.yaml"
    path.write_text(
        yaml.safe_dump({"preset": "smoke", "experiment": "fig4", "title": "t", "stages": STAGES} | changed)
    )
    return path


STAGES = [{"alpha": 0.5, "lr": 0.001, "from": "base"}]
STAGE = STAGES[0]
ADAPTIVE = {"lr": 0.001, "from": "a0.5-lr0.001"}
BAD = {
    "misspelt key": ({"keepratio": 0.5}, r"fig4\.yaml: parameter 'keepratio' is unknown; did you mean 'keep_ratio'\?"),
    "unknown key": ({"zzz": 1}, r"'zzz' is unknown; there are: preset"),
    "misspelt stage key": ({"stages": [STAGE | {"trainwide": True}]}, r"stages\.0\.trainwide: unknown parameter; did you mean 'train_wide'"),
    "number as text": ({"stages": [STAGE | {"lr": "1e-3"}]}, r"stages\.0\.lr: '1e-3' is text, a number is needed; YAML reads 1\.0e-3"),
    "setting as text": ({"weight_decay": "5e-4"}, r"weight_decay: '5e-4' is text"),
    "alpha above 1": ({"stages": [STAGE | {"alpha": 1.5}]}, r"stages\.0\.alpha: .*less than or equal to 1"),
    "alpha below 0": ({"stages": [STAGE | {"alpha": -0.5}]}, r"stages\.0\.alpha: .*greater than or equal to 0"),
    "alpha nan": ({"stages": [STAGE | {"alpha": float("nan")}]}, r"stages\.0\.alpha"),
    "lr infinite": ({"stages": [STAGE | {"lr": float("inf")}]}, r"stages\.0\.lr"),
    "lr zero": ({"stages": [STAGE | {"lr": 0}]}, r"stages\.0\.lr"),
    "keep_ratio 0": ({"keep_ratio": 0.0}, r"keep_ratio: .*greater than 0"),
    "keep_ratio 2": ({"keep_ratio": 2.0}, r"keep_ratio: .*less than or equal to 1"),
    "keep_ratio true": ({"keep_ratio": True}, r"keep_ratio"),
    "epochs 0": ({"max_epochs": 0}, r"max_epochs"),
    "epochs 1.5": ({"max_epochs": 1.5}, r"max_epochs"),
    "seed negative": ({"seed": -1}, r"seed"),
    "data unknown": ({"data": "mnist"}, r"data: .*'cifar10', 'cifar10-49500' or 'sample'"),
    "no lr": ({"stages": [{"alpha": 0.5, "from": "base"}]}, r"stages\.0\.lr: missing"),
    "no parent": ({"stages": [{"alpha": 0.5, "lr": 0.1}]}, r"stages\.0\.from: missing"),
    "stages a number": ({"stages": 3}, r"stages must be a list"),
    "stage a word": ({"stages": ["fig4"]}, r"stages\.0 is 'fig4'"),
    "name with a path": ({"stages": [STAGE | {"name": "../../x"}]}, r"stages\.0\.name"),
    "stage twice": ({"stages": STAGES * 2}, r"'a0\.5-lr0\.001' stands twice"),
    "schedule unknown": ({"stages": [{"schedule": "sawtooth", "by": 0.1, "lr": 0.1, "from": "base"}]}, r"stages\.0\.schedule"),
    "schedule of nothing": ({"stages": [{"schedule": "listed", "by": [], "lr": 0.1, "from": "base"}]}, r"fig4\.yaml: stages\.0\.by: a listed schedule needs"),
    "schedule by 0": ({"stages": [{"schedule": "step", "by": 0, "lr": 0.1, "from": "base"}]}, r"stages\.0\.by"),
    "nothing trains": ({"stages": [STAGE | {"alpha": 1.0, "train_wide": False}]}, r"trains nothing"),
    "adaptive, nothing trains": ({"adaptive": ADAPTIVE | {"draw": "bernoulli", "train_wide": False}}, r"fig4\.yaml: adaptive: .*draw: bernoulli with train_wide false trains nothing"),
    "adaptive skips with branches": ({"anneal": "skips", "adaptive": ADAPTIVE | {"alongside": 1.0}}, r"fig4\.yaml: .*anneal: skips has no branches, which alongside needs"),
    "adaptive skips that train alone": ({"anneal": "skips", "adaptive": ADAPTIVE | {"train_wide": False}}, r"fig4\.yaml: .*anneal: skips has no branches that could train alone"),
    "another name": ({"experiment": "fig3"}, r"must be 'smoke' and 'fig4'"),
    "stages of nobody": ({"stages_of": "nobody"}, r"stages_of: .* does not exist"),
    "parent that does not exist": ({"stages": [STAGE | {"from": "a0.7"}]}, r"has no stage 'a0\.7', which fig4/a0\.5-lr0\.001 starts from; it has: a0\.5"),
    "experiment that does not exist": ({"stages": [STAGE | {"from": "nobody/a1"}]}, r"experiment 'nobody' is unknown in preset 'smoke'; there are"),
    "own parent": ({"stages": [STAGE | {"from": "a0.5-lr0.001"}]}, r"starts from itself: fig4/a0\.5-lr0\.001 <- fig4/a0\.5-lr0\.001"),
    "circular": ({"stages": [STAGE | {"name": "x", "from": "y"}, STAGE | {"name": "y", "from": "x"}]}, r"starts from itself: fig4/x <- fig4/y <- fig4/x"),
    "no weights": ({"base": "results/nothing.safetensors"}, r"results/nothing\.safetensors are missing; run `make pretrain PRESET=smoke`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_anything_runs(project, name):
    changed, message = BAD[name]
    base = project / "results" / "smoke" / "pretrained" / "vgg16.safetensors.sha256"
    base.parent.mkdir(parents=True)
    base.write_text("0" * 64)
    put(project, **changed)
    with pytest.raises(UsageError, match=message) as caught:
        Experiment("smoke", "fig4", project)
    assert "\n" not in str(caught.value)
    assert not (project / "results" / "smoke" / "stages").exists()


def test_a_stage_of_another_preset_is_named_by_the_file_it_stands_in(project):
    theirs = project / "params" / "report" / "fig1.yaml"
    content = yaml.safe_load(theirs.read_text())
    content["stages"][0]["lr"] = "fast"
    theirs.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=r"params/report/fig1\.yaml: stages\.0\.lr: 'fast' is text"):
        load_settings("smoke", "fig1", project)
    theirs = project / "params" / "report" / "resnet20_narrow.yaml"
    theirs.write_text(yaml.safe_dump(yaml.safe_load(theirs.read_text()) | {"folds": ["best"]}))
    with pytest.raises(UsageError, match=r"params/report/resnet20_narrow\.yaml: folds"):
        load_settings("smoke", "resnet20_narrow", project)


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just text", "\x00", "1: 2"])
def test_what_is_not_a_parameter_file_is_named(project, content):
    (project / "params" / "smoke" / "fig4.yaml").write_text(content)
    with pytest.raises(UsageError, match=r"fig4\.yaml"):
        load_settings("smoke", "fig4", project)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["params/smoke/fig4.yaml", "--set", "alpha=2"], "parameter 'alpha' is unknown"),
        (["params/smoke/fig4.yaml", "--set", "keep_ratio=2.0"], "keep_ratio"),
        (["params/smoke/fig4.yaml", "--set", "seed"], "write NAME=VALUE"),
        (["params/smoke/fig4.yaml", "--set", "seed=["], "is not a YAML value"),
        (["params/smoke/pretrain.yaml", "--set", "width=0.001"], "width is 0.001"),
        (["params/smoke/fig9.yaml"], "params/smoke/fig9.yaml does not exist"),
        (["params/nobody/fig4.yaml"], "params/nobody/fig4.yaml does not exist"),
    ],
)
def test_the_command_line_ends_with_one_line_and_exit_code_2(project, arguments, message):
    done = subprocess.run(
        [sys.executable, "-m", "alphaprune.experiment", *arguments],
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    left = [p for p in (project / "results").rglob("*") if p.is_file() and p.name != ".lock"]
    assert left == []


def test_unknown_preset_and_experiment_list_what_there_is(project):
    with pytest.raises(UsageError, match="preset 'slow' is unknown; there are: gpu, quick, report, smoke"):
        load_settings("slow", "fig4", project)
    with pytest.raises(
        UsageError,
        match=r"experiment 'fig9' is unknown in preset 'smoke'; there are: .*earlier_run, fig1",
    ):
        load_settings("smoke", "fig9", project)
