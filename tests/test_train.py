"""A stage: learns, stops, resumes exactly, survives a loss that explodes."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alphaprune import ParallelModel, data
from alphaprune.models import VGG
from alphaprune.train import Recipe, derive_seed, evaluate, fit

RECIPE = Recipe(lr=0.05, max_epochs=4, batch_size=32, log_every=2, lr_patience=0, weight_decay=1e-3)
SAMPLE = data.load("sample")
TRAIN, VAL = SAMPLE.train.first(96), SAMPLE.val.first(40)


def model(alpha=0.5, train_wide=True):
    torch.manual_seed(0)
    made = ParallelModel(VGG([6, "M", 8, "M", 8, "M", "M", "M"]), 0.5, torch.zeros(1, 3, 32, 32))
    made.alpha, made.train_wide = alpha, train_wide
    return made


class Killed(Exception):
    pass


@settings(max_examples=6, deadline=None)
@given(
    st.sets(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from(["plateau", "one_cycle"]),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
)
def test_killed_and_resumed_equals_uninterrupted(tmp_path_factory, kills, schedule, alpha, train_wide):
    recipe = dataclasses.replace(RECIPE, lr_schedule=schedule)
    folder = tmp_path_factory.mktemp("resume")
    whole = model(alpha, train_wide)
    expected = fit(whole, TRAIN, VAL, recipe, "key", folder / "whole.safetensors")

    def die(outcome):
        if outcome.epochs in kills:
            kills.remove(outcome.epochs)
            raise Killed

    for _ in range(len(kills) + 1):
        torch.rand(7)  # whatever else uses random numbers meanwhile
        resumed = model(alpha, train_wide)
        try:
            outcome = fit(resumed, TRAIN, VAL, recipe, "key", folder / "cut.safetensors", die)
        except Killed:
            continue
    assert outcome.history == expected.history
    assert (outcome.best_epoch, outcome.steps, outcome.images) == (
        expected.best_epoch,
        expected.steps,
        expected.images,
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_another_key_gives_another_run(tmp_path):
    runs = [
        fit(model(), TRAIN, VAL, RECIPE, key, tmp_path / f"{key}.safetensors").history for key in ("a", "b")
    ]
    assert runs[0] != runs[1]


def test_a_checkpoint_cut_off_while_written_starts_the_stage_again(tmp_path):
    path = tmp_path / "c.safetensors"
    expected = fit(model(), TRAIN, VAL, RECIPE, "key", path)
    path.write_bytes(path.read_bytes()[:1000])
    assert fit(model(), TRAIN, VAL, RECIPE, "key", path).history == expected.history


def test_training_learns_and_keeps_the_best_checkpoint(tmp_path):
    trained = model(1.0)
    outcome = fit(
        trained,
        SAMPLE.train,
        SAMPLE.train,
        dataclasses.replace(RECIPE, max_epochs=12),
        "key",
        tmp_path / "c.safetensors",
    )
    accuracies = [r["value"] for r in outcome.history if (r["split"], r["metric"]) == ("val", "accuracy")]
    assert max(accuracies[1:]) == outcome.best_accuracy > accuracies[0] + 0.1
    assert evaluate(trained, SAMPLE.train)[1] == outcome.best_accuracy


def test_frozen_wide_weights_stay_as_they_are(tmp_path):
    trained = model(0.5, train_wide=False)
    before = {k: v.clone() for k, v in trained.named_parameters()}
    fit(trained, TRAIN, VAL, RECIPE, "key", tmp_path / "c.safetensors")
    changed = {k for k, v in trained.named_parameters() if not torch.equal(before[k], v)}
    assert changed and not any(k.startswith("network.") for k in changed)


def test_patience_ends_a_stage(tmp_path):
    still = dataclasses.replace(RECIPE, lr=1e-12, max_epochs=50, patience=2, momentum=0.0)
    frozen_statistics = model(1.0)
    for m in frozen_statistics.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.momentum = 0.0
    outcome = fit(frozen_statistics, TRAIN, VAL, still, "key", tmp_path / "c.safetensors")
    assert outcome.epochs <= 10


def test_a_loss_that_explodes_ends_the_stage_with_finite_weights(tmp_path):
    wild = model(0.5)
    outcome = fit(wild, TRAIN, VAL, dataclasses.replace(RECIPE, lr=1e30), "key", tmp_path / "c.safetensors")
    assert outcome.diverged and outcome.epochs < 4
    assert all(torch.isfinite(v).all() for v in wild.state_dict().values())


def test_seeds_depend_on_every_part():
    seeds = {derive_seed(*parts) for parts in [("a", 1), ("a", 2), ("b", 1), ("a", "1")]}
    assert len(seeds) == 4 and all(0 <= s < 2**63 for s in seeds)
