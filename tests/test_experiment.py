"""Experiments on real images at smoke: what runs, what is not run again, what is recorded."""

import json
import os
import re

import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT

from alphaprune import UsageError, data, fold
from alphaprune.experiment import COLUMNS, Experiment, main
from alphaprune.measure import parameters
from alphaprune.models import resnet20
from alphaprune.prune import prune
from alphaprune.pruned import Pruned, load_pruned
from alphaprune.results import TRAINED, Results
from alphaprune.results import main as results_of
from alphaprune.stage_networks import StageNetworks
from alphaprune.train import evaluate


@pytest.fixture
def small(project):
    """The smoke preset with a pretrained network and a Figure 4 of two stages."""
    file = project / "params" / "smoke" / "fig4.yaml"
    stages = [
        {"alpha": 0.5, "lr": 0.01, "from": "base"},
        {"alpha": 0.0, "lr": 0.1, "from": "a0.5-lr0.01"},
    ]
    file.write_text(yaml.safe_dump({"title": "t", "stages": stages}))
    pretrain = project / "params" / "smoke" / "pretrain.yaml"
    pretrain.write_text(pretrain.read_text().replace("max_epochs: 3", "max_epochs: 1"))
    Experiment("smoke", "pretrain", project).run(lambda line: None)
    return project


def run(project, name="fig4", **given):
    lines = []
    experiment = Experiment("smoke", name, project, **given)
    history = experiment.run(lines.append)
    return experiment, history, lines


def test_stages_run_once_and_say_why(small):
    experiment, first, lines = run(small)
    assert "2 stages to train, 0 already recorded" in lines[0]
    assert any("not recorded yet; starts from base" in line for line in lines)
    assert any("epoch 1/1" in line and "left" in line for line in lines)
    assert list(first.columns) == COLUMNS
    assert set(first["stage"]) == {"a0.5-lr0.01", "a0-lr0.1"}
    _, second, lines = run(small)
    assert lines == ["[fig4] 0 stages to train, 2 already recorded"]
    pd.testing.assert_frame_equal(first, second)
    record = experiment.record("a0.5-lr0.01")
    assert record["identity"] == experiment.find("a0.5-lr0.01").identity
    assert {
        "commit",
        "versions",
        "hardware",
        "settings",
        "outcome",
        "metrics",
        "data_checksum",
    } <= record.keys()


def test_the_same_parameters_give_the_same_history_and_weights(small):
    experiment, first, _ = run(small)
    digest = experiment.record("a0-lr0.1")["weights_sha256"]
    again = Experiment("smoke", "fig4", small)
    second = again.run(lambda line: None, again=True)
    pd.testing.assert_frame_equal(first, second)
    assert again.record("a0-lr0.1")["weights_sha256"] == digest


@pytest.mark.parametrize(
    "changed", [{"seed": 1}, {"lr_scale": 2.0}, {"train_images": 96}, {"keep_ratio": 0.5}, {"momentum": 0.8}]
)
def test_what_determines_a_result_makes_another_stage(small, changed):
    files, given = Experiment("smoke", "fig4", small), Experiment("smoke", "fig4", small, **changed)
    for a, b in zip(files.stages, given.stages, strict=True):
        assert a.identity != b.identity
    assert given.label == "fig4," + "=".join(map(str, *changed.items()))


@pytest.mark.parametrize("changed", [{"threads": 2}, {"title": "other"}])
def test_what_does_not_determine_a_result_does_not(small, changed):
    files, given = Experiment("smoke", "fig4", small), Experiment("smoke", "fig4", small, **changed)
    assert [n.identity for n in files.stages] == [n.identity for n in given.stages]


def test_a_changed_parent_makes_its_children_run_again(small):
    run(small)
    file = small / "params" / "smoke" / "fig4.yaml"
    content = yaml.safe_load(file.read_text())
    content["stages"][0]["train_wide"] = False
    file.write_text(yaml.safe_dump(content))
    experiment = Experiment("smoke", "fig4", small)
    first, second = (experiment.why(n) for n in experiment.stages)
    assert first == "recorded with other inputs (stage.train_wide True -> False)"
    assert re.fullmatch(r"recorded with other inputs \(parent \w{8} -> \w{8}\)", second)


def test_parents_in_another_experiment_are_trained_first(small):
    (small / "params" / "smoke" / "fig1.yaml").write_text(
        yaml.safe_dump({"title": "t", "stages": [{"alpha": 0.0, "lr": 0.01, "from": "fig4/a0.5-lr0.01"}]})
    )
    experiment, history, lines = run(small, "fig1")
    assert "2 stages to train" in lines[0] and set(history["stage"]) == {"a0-lr0.01"}
    curves = experiment.curves()
    assert dict(curves.groupby("stage")["start"].first()) == {"a0.5-lr0.01": 0, "a0-lr0.01": 4}


def test_records_suffice_where_the_weights_are_gone(small):
    _, history, _ = run(small)
    for weights in (small / "results" / "smoke" / "stages" / "fig4").rglob("weights.safetensors*"):
        weights.unlink()
    _, again, lines = run(small)
    assert "0 stages to train" in lines[0]
    pd.testing.assert_frame_equal(history, again)


def run_stopped_at(moment, project, **given):
    """Figure 4 without its records: stopped when a line says so, then run again."""
    for folder in (project / "results" / "smoke" / "stages" / "fig4").iterdir():
        for file in folder.iterdir():
            file.unlink()

    def say(line):
        if moment in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Experiment("smoke", "fig4", project, **given).run(say)
    return run(project, **given)


def test_an_interrupted_experiment_goes_on_where_it_was(small):
    _, expected, _ = run(small, max_epochs=3)
    _, resumed, lines = run_stopped_at("epoch 2/3", small, max_epochs=3)
    assert not any("1/2 a0.5-lr0.01: epoch 1/3" in line for line in lines)
    pd.testing.assert_frame_equal(expected, resumed)


@pytest.mark.parametrize("draw", ["fixed", "bernoulli"])
def test_alpha_falls_within_a_stage_and_only_what_has_arrived_is_kept(small, draw):
    stage = {"alpha": 0.0, "alpha_from": 1.0, "lr": 0.02, "from": "base", "draw": draw, "order": "front"}
    given = {"stages": [stage], "max_epochs": 4, "lr_schedule": "one_cycle", "fold_now_every": 1}
    experiment, expected, _ = run(small, **given)
    measured = expected[(expected["split"] == "val") & (expected["metric"] == "accuracy")]
    assert measured["alpha"].tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]
    running = expected[expected["metric"] == "fold_now_running"]["value"]
    assert (
        running.iloc[2:].tolist() == measured["value"].iloc[2:].tolist()
    )  # at alpha 0 it is the same network
    record = experiment.record("a0-lr0.02")
    assert record["outcome"]["best_epoch"] >= 2
    assert (
        record["metrics"]["val_accuracy"] == record["metrics"]["fold_now"] == measured["value"].iloc[2:].max()
    )
    model = experiment.model("a0-lr0.02")
    assert model.alpha == 0.0
    again, resumed, lines = run_stopped_at("epoch 1/4", small, **given)
    assert not any("epoch 1/4" in line for line in lines)
    pd.testing.assert_frame_equal(expected, resumed)
    assert again.record("a0-lr0.02")["weights_sha256"] == record["weights_sha256"]


def test_fold_now_is_the_accuracy_of_the_folded_network(small):
    from alphaprune import data
    from alphaprune.train import evaluate

    experiment, history, _ = run(small)
    model = experiment.model("a0.5-lr0.01")
    folded, _ = fold(model, force=True)
    val = data.load("sample").val.first(experiment.settings.val_images)
    recorded = history[(history["stage"] == "a0.5-lr0.01") & (history["metric"] == "fold_now")]["value"]
    assert recorded.tolist() == [evaluate(folded, val)[1]]


def test_prune_records_the_table_and_the_test_set(small):
    run(small)
    experiment = Experiment("smoke", "pruned", small)
    assert load_pruned(experiment) is None
    pruned = prune(experiment)
    assert pruned.certificate.exact
    accuracy = pruned.table.set_index("network")["test_accuracy"]
    assert accuracy["folded"] == accuracy["alpha 0"]
    assert load_pruned(Experiment("smoke", "pruned", small, seed=1)) is None
    assert Results("smoke", small).accuracy("pruned/folded") == pytest.approx(100 * accuracy["folded"])
    record = next((small / "results" / "smoke" / "stages" / "pruned").glob("*/run.json"))
    assert json.loads(record.read_text())["certificate"]["alpha"] == 0

    for weights in (small / "results" / "smoke" / "stages").rglob("*.safetensors*"):
        weights.unlink()
    before = record.read_bytes()
    again = prune(experiment)  # from the record: no weights, and no second reading of the test set
    assert (again.network, again.certificate) == (pruned.network, pruned.certificate)
    pd.testing.assert_frame_equal(again.table, pruned.table)
    assert record.read_bytes() == before


def test_a_report_before_its_experiments_names_the_command(small):
    missing = r"nothing to report yet \(stage week_before/\S+: not recorded yet\); run "
    with pytest.raises(UsageError, match=f"{missing}make reproduce-figures PRESET=smoke$"):
        Results("smoke", small).check_complete()
    with pytest.raises(UsageError, match=rf"{missing}.* params/smoke/week_before\.yaml --set seed=1$"):
        Results("smoke", small, seed=1).check_trained()
    with pytest.raises(UsageError, match=r"not recorded yet; run its experiment first: .*/smoke/fig4\.yaml$"):
        Experiment("smoke", "fig4", small).model("a0.5-lr0.01")


def test_claims_are_held_against_what_is_recorded_so_far(monkeypatch, capsys):
    """Of the records in git, and docs/reproduction.md says the same."""
    monkeypatch.chdir(ROOT)
    results_of(["gpu"])
    *table, counts = capsys.readouterr().out.splitlines()
    assert len(table) == 28
    found = {verdict: int(n) for n, verdict in re.findall(r"(\d+) ([a-z ]+)", counts)}
    page = (ROOT / "docs" / "reproduction.md").read_text()
    assert (
        f"{found.pop('reproduced')} are reproduced, {found.pop('not reproduced')} not, and {found.pop('report left open')} were left open"
    ) in page
    assert not found
    experiments = [Experiment("gpu", name, ROOT) for name in TRAINED]
    assert sum(len(e.stages) for e in experiments) == 48
    assert all(
        e.reasons() == [f"{e.settings.experiment}: all {len(e.stages)} stages are recorded"]
        for e in experiments
    )
    with pytest.raises(SystemExit):
        results_of(["slow"])
    assert capsys.readouterr().err.startswith("alphaprune: preset 'slow' is unknown")


def test_only_another_augmentation_is_part_of_the_identity(small):
    node = lambda **given: Experiment("smoke", "pretrain", small, **given).stages[0]  # noqa: E731
    trivial = {"augment": "trivial", "lr_schedule": "one_cycle"}
    own = {"augment", "augment_until", "trivial_version"}
    assert not own & set(node().determines["recipe"]) and own <= set(node(**trivial).determines["recipe"])
    found = [node(**g).identity for g in ({}, {"augment": "crop"}, trivial, trivial | {"augment_until": 0.5})]
    assert found[0] == found[1] and len(set(found)) == 3
    mirrored = node(augment="mirror")
    assert own & set(mirrored.determines["recipe"]) == {"augment"} and mirrored.identity not in found


def test_only_other_weights_that_are_kept_are_part_of_the_identity(small):
    node = lambda **given: Experiment("smoke", "pretrain", small, **given).stages[0]  # noqa: E731
    assert "keep" not in node().determines["recipe"] and node(keep="best").identity == node().identity
    assert node(keep="last").identity != node().identity


def test_only_another_optimizer_is_part_of_the_identity(small):
    plain, sgd, muon = (
        Experiment("smoke", "pretrain", small, **given).stages[0]
        for given in ({}, {"optimizer": "sgd"}, {"optimizer": "muon"})
    )
    assert plain.identity == sgd.identity != muon.identity
    assert {"optimizer", "muon_version"} & set(plain.determines["recipe"]) == set()
    assert muon.determines["recipe"]["optimizer"] == "muon"


def test_figures_of_another_seed_have_another_name(small):
    figures = small / "results" / "smoke" / "figures"
    assert Experiment("smoke", "fig4", small).figure("figure4") == figures / "figure4"
    assert Experiment("smoke", "fig4", small, seed=1).figure("figure4") == figures / "figure4,seed=1"
    assert Results("smoke", small, seed=1).named("scorecard") == "scorecard,seed=1"


def test_a_layer_of_a_pruned_network_prints_as_it_does_alone():
    network = resnet20()
    pruned = Pruned(str(network), None, None, None)
    assert pruned.layer("blocks.3") == f"(3): {network.blocks[3]}"
    assert pruned.layer("blocks.3.conv2") == f"(conv2): {network.blocks[3].conv2}"
    with pytest.raises(UsageError, match=r"no layer 'blocks\.9'"):
        pruned.layer("blocks.9")


def test_frozen_stages_leave_the_pretrained_weights(small):
    content = {"title": "t", "stages": [{"alpha": 0.5, "lr": 0.1, "from": "base", "train_wide": False}]}
    (small / "params" / "smoke" / "week_before.yaml").write_text(yaml.safe_dump(content))
    experiment, _, _ = run(small, "week_before")
    trained = dict(experiment.model("a0.5-lr0.1").network.named_parameters())
    for name, value in experiment.base_network().named_parameters():
        assert torch.equal(value, trained[name])


def test_weights_of_another_width_are_named(small):
    with pytest.raises(UsageError, match=r"vgg16\.safetensors do not fit a vgg16 of width 0\.25; set width"):
        Experiment("smoke", "fig4", small, width=0.25).run(lambda line: None)


def test_only_the_files_own_settings_publish(small):
    weights = small / "results" / "smoke" / "pretrained" / "vgg16.safetensors"
    before = weights.read_bytes()
    Experiment("smoke", "pretrain", small, seed=1).run(lambda line: None)
    assert weights.read_bytes() == before
    assert Experiment("smoke", "pretrain", small).published_is_current()
    assert not Experiment("smoke", "pretrain", small, seed=1).published_is_current()


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ({"lr": 0.1, "from": "fig4/a0.5-lr0.01"}, {}, "'fig1/x' has no alpha, but 'fig4/a0.5-lr0.01'"),
        (
            {"alpha": 0.1, "lr": 0.1, "from": "fig4/a0.5-lr0.01"},
            {"keep_ratio": 0.5},
            "keep_ratio is 0.5 at 'fig1/x', but",
        ),
    ],
)
def test_a_parent_that_does_not_fit_is_named_before_anything_trains(small, stage, settings, message):
    content = {"title": "t", "stages": [{"name": "x"} | stage]} | settings
    (small / "params" / "smoke" / "fig1.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=message):
        Experiment("smoke", "fig1", small)


def test_a_first_epoch_that_diverges_is_not_scored_with_what_it_began_with(small):
    experiment, history, _ = run(small, lr_scale=1e30)
    record = experiment.record("a0.5-lr0.01")
    accuracy = history[
        (history["stage"] == "a0.5-lr0.01") & (history["metric"] == "accuracy") & (history["split"] == "val")
    ]
    assert record["outcome"]["diverged"]
    assert record["metrics"]["val_accuracy"] == accuracy["value"].iloc[-1]


def stages_of(project, stages, **changed):
    file = project / "params" / "smoke" / "fig4.yaml"
    file.write_text(yaml.safe_dump({"title": "t", "stages": stages, **changed}))


def test_narrow_networks_are_folded_or_begun_otherwise_and_train_on_plain(small):
    stages = [
        {"name": "blend", "alpha": 0.5, "lr": 0.01, "from": "base", "alongside": 0.5, "order": "front"},
        {"name": "after", "lr": 0.01, "from": "blend", "narrow": "fold"},
        {"name": "more", "lr": 0.01, "from": "after", "distill": 0.9},
        {"name": "at-once", "lr": 0.01, "from": "base", "narrow": "fold"},
        {"name": "scratch", "lr": 0.01, "from": "base", "narrow": "scratch"},
        {"name": "l1", "lr": 0.01, "from": "base", "narrow": "torch-pruning-l1"},
        {"name": "l2", "lr": 0.01, "from": "base", "narrow": "torch-pruning-l2"},
        {"name": "bn", "lr": 0.01, "from": "base", "narrow": "torch-pruning-bn"},
        {"name": "wide", "lr": 0.01, "from": "base"},
    ]
    stages_of(small, stages, init="least_squares", init_images=100)
    experiment, history, _ = run(small)
    # What `after` begins with is what `blend` would have scored if folded.
    first = history[
        (history["stage"] == "after") & (history["metric"] == "accuracy") & (history["epoch"] == 0)
    ]
    assert first["value"].item() == experiment.record("blend")["metrics"]["fold_now"]
    running = history[history["metric"] == "fold_now_running"]
    assert set(running["stage"]) == {"blend"} and set(running["epoch"]) == {0, 1}
    sizes = {
        name: parameters(experiment.model(name))
        for name in ("after", "more", "at-once", "scratch", "l1", "bn")
    }
    assert len(set(sizes.values())) == 1
    for name in ("more", "l2", "wide"):  # what is loaded is what was trained
        network, val = experiment.model(name), data.load("sample").val.first(experiment.settings.val_images)
        best = experiment.record(name)["outcome"]["best_accuracy"]
        assert evaluate(network, val)[1] == best
    others = [n.stage.name == "wide" for n in experiment.stages]  # has no branches
    ridge = Experiment("smoke", "fig4", small, init_ridge=0.1)
    assert [a.identity == b.identity for a, b in zip(experiment.stages, ridge.stages, strict=True)] == others
    other = Experiment("smoke", "fig4", small, init="select")
    assert [a.identity == b.identity for a, b in zip(experiment.stages, other.stages, strict=True)] == others
    by_norm = Experiment("smoke", "fig4", small, init="select", select_by="norm")
    assert [a.identity == b.identity for a, b in zip(other.stages, by_norm.stages, strict=True)] == others
    kept = [
        StageNetworks(e).begun(next(n for n in e.stages if n.stage.alpha is not None)).widths.kept
        for e in (other, by_norm)
    ]
    assert kept[0].sum() == kept[1].sum() and not torch.equal(*kept)


def test_widths_a_layer_are_the_same_for_every_way_to_narrow(small):
    ways = ("fold", "scratch", "torch-pruning-l1")
    stages = [{"name": way, "lr": 0.01, "from": "base", "narrow": way} for way in ways]
    stages_of(small, stages, init="least_squares", init_images=100)
    found = {}
    for widths, round_to in (("uniform", 1), ("sensitivity", 1), ("sensitivity", 4), ("torch-pruning-l1", 1)):
        experiment, _, _ = run(small, widths=widths, round_to=round_to)
        shapes = [[tuple(p.shape) for p in experiment.model(way).parameters()] for way in ways]
        assert all(s == shapes[0] for s in shapes)
        found[widths, round_to] = shapes[0]
    assert len({str(s) for s in found.values()}) == 4
    assert all(s[0] % 4 == 0 for s in found["sensitivity", 4][:-2])  # the last layer gives the classes


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"alpha": 0.5, "lr": 0.1, "from": "base", "narrow": "fold"}], "narrow gives a plain network, which has no alpha"),
        ([{"lr": 0.1, "from": "base", "alongside": 1.0}], "belong to branches; give an alpha"),
        ([{"name": "a", "lr": 0.1, "from": "base", "narrow": "fold"}, {"alpha": 0.5, "lr": 0.1, "from": "a"}], "is narrow already"),
        ([{"name": "a", "alpha": 0.5, "lr": 0.1, "from": "base"}, {"lr": 0.1, "from": "a", "narrow": "scratch"}], "needs `from: base`"),
        ([{"name": "a", "alpha": 0.5, "lr": 0.1, "from": "base"}, {"lr": 0.1, "from": "a"}], "give it an alpha, or narrow: fold"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else "",
)  # fmt: skip
def test_narrow_stages_that_make_no_sense_are_refused(small, stages, message):
    stages_of(small, stages)
    with pytest.raises(UsageError, match=message):
        Experiment("smoke", "fig4", small)


def test_an_adaptive_schedule_ends_at_0_and_goes_on_where_it_stopped(small):
    adaptive = {"lr": 0.01, "from": "start", "survive": 0.05, "smallest": 0.3}
    stages_of(
        small, [{"name": "start", "alpha": 1.0, "lr": 0.01, "from": "base"}], adaptive=adaptive, folds="best"
    )
    experiment, history, lines = run(small)
    assert "1 stage to train and those that follow from it" in lines[0]
    summary = experiment.summary()
    assert summary["alpha"].iloc[-1] == 0 and summary["stage"].iloc[1] == "try01-a0.5"
    last = experiment.folder(experiment.stages[-1]) / "run.json"
    last.unlink()
    again, same, lines = run(small)
    assert len([x for x in lines if "starts from" in x]) == 1
    pd.testing.assert_frame_equal(history, same)
    assert again.to_fold().endswith("-a0")
    stages_of(small, [{"name": "plain", "lr": 0.01, "from": "base"}], adaptive=adaptive | {"from": "plain"})
    with pytest.raises(UsageError, match="which has no alpha; name a stage that has"):
        Experiment("smoke", "fig4", small)


def test_refit_of_the_pretrained_network_is_its_least_squares_start(small):
    stage = {"alpha": 0.0, "lr": 0.01, "from": "base"}
    refitted = Experiment("smoke", "fig4", small, stages=[stage | {"refit": "least_squares"}])
    started = Experiment("smoke", "fig4", small, stages=[stage], init="least_squares")
    a, b = (StageNetworks(e).begun(e.stages[0]).state_dict() for e in (refitted, started))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_refit_puts_fitted_branches_beside_the_wide_weights_of_a_stuck_stage(small):
    file = small / "params" / "smoke" / "freed.yaml"
    stages = [
        {"name": "freed", "alpha": 0.0, "lr": 0.01, "from": "fig4/a0.5-lr0.01", "refit": "least_squares"},
        {
            "name": "folded",
            "narrow": "fold",
            "lr": 0.01,
            "from": "fig4/a0.5-lr0.01",
            "refit": "least_squares",
        },
        {"name": "on", "alpha": 0.0, "lr": 0.01, "from": "freed"},
    ]
    file.write_text(yaml.safe_dump({"title": "t", "stages": stages}))
    experiment, history, _ = run(small, "freed")
    starts = history[(history["step"] == 0) & (history["metric"] == "accuracy") & (history["split"] == "val")]
    begun = starts.groupby("stage")["value"].first()
    assert begun["freed"] == begun["folded"]  # folding is exact
    wide = StageNetworks(experiment).wide_program(experiment.find("fig4/a0.5-lr0.01"))
    stuck = experiment.model("fig4/a0.5-lr0.01").network.state_dict()
    for name, value in wide.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, stuck[name])
    val = data.load("sample").val.first(64)
    small_network = fold(experiment.model("on"))[0]
    assert parameters(small_network) == parameters(experiment.model("folded"))
    assert evaluate(experiment.model("on"), val)[1] == evaluate(small_network, val)[1]


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (
            {"lr": 0.1, "from": "base", "refit": "least_squares"},
            "refit makes new branches; give the stage an alpha",
        ),
        (
            {"alpha": 0.5, "lr": 0.1, "from": "scratch", "refit": "least_squares"},
            "refit needs base or a stage with branches",
        ),
        (
            {"alpha": 0.5, "lr": 0.1, "from": "pretrain/base", "refit": "least_squares"},
            "refit needs base or a stage with branches",
        ),
    ],
)
def test_refit_needs_branches(small, stage, message):
    file = small / "params" / "smoke" / "freed.yaml"
    file.write_text(yaml.safe_dump({"title": "t", "stages": [stage]}))
    with pytest.raises(UsageError, match=message):
        Experiment("smoke", "freed", small)


def test_why_names_the_input_that_changed(small, capsys):
    fig4 = small / "params" / "smoke" / "fig4.yaml"
    run(small)
    content = yaml.safe_load(fig4.read_text())
    os.utime(fig4)  # as a checkout would

    def why():
        main([str(fig4), "--why"])
        return capsys.readouterr().out.splitlines()

    assert why() == ["fig4: all 2 stages are recorded"]
    content["stages"][1] |= {"lr": 0.3, "name": "a0-lr0.1"}
    fig4.write_text(yaml.safe_dump(content))
    changed = "recipe.lr 0.1 -> 0.3; stage.lr 0.1 -> 0.3"
    assert why() == [f"fig4/a0-lr0.1: recorded with other inputs ({changed})"]
    fig4.write_text(yaml.safe_dump(content | {"seed": 1}))
    first, second = why()
    assert first == "fig4/a0.5-lr0.01: recorded with other inputs (seed 0 -> 1)"
    assert re.search(
        r"fig4/a0-lr0.1: .*\(parent \w{8} -> \w{8}; recipe.lr 0.1 -> 0.3; .* and 1 more\)", second
    )
