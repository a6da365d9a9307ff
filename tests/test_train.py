"""A stage: learns, stops, resumes exactly, survives a loss that explodes."""

import dataclasses
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from alphaprune import ParallelModel, UsageError, data, muon, train
from alphaprune.faulty_kernels import without_them
from alphaprune.interrupt import Interrupted
from alphaprune.models import VGG, resnet20
from alphaprune.objective import Loss, Objective
from alphaprune.schedule import falling
from alphaprune.train import Recipe, derive_seed, evaluate, fit

RECIPE = Recipe(lr=0.05, max_epochs=4, batch_size=32, log_every=2, lr_patience=0, weight_decay=1e-3)
SAMPLE = data.load("sample")
TRAIN, VAL = SAMPLE.train.first(96), SAMPLE.val.first(40)


def model(alpha=0.5, train_wide=True):
    torch.manual_seed(0)
    made = ParallelModel(VGG([6, "M", 8, "M", 8, "M", "M", "M"]), 0.5, torch.zeros(1, 3, 32, 32))
    made.alpha, made.train_wide = alpha, train_wide
    return made


def falls(made, alpha):
    """Alpha from 1 to that of the stage, over the first half of it."""

    def anneal(done):
        made.alpha = falling(2 * done, 1.0, alpha)
        return done >= 0.5

    return anneal


class Killed(Exception):
    pass


class Dies:
    """An optimizer that stops the process's work at steps of its choice, as a kill would: whatever was not saved is lost."""

    left: list[int] = []  # shared by all

    def step(self, closure=None):
        super().step(closure)
        if Dies.left and Dies.left[0] == 0:
            Dies.left.pop(0)
            raise Killed
        if Dies.left:
            Dies.left[0] -= 1


class DiesAfter(Dies, torch.optim.SGD):
    pass


class MuonDiesAfter(Dies, muon.Muon):
    pass


def same(outcome, expected, resumed, whole):
    assert outcome.history == expected.history
    numbers = ("best_epoch", "best_accuracy", "epochs", "steps", "images", "diverged")
    assert [getattr(outcome, n) for n in numbers] == [getattr(expected, n) for n in numbers]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from(["plateau", "one_cycle"]),
    st.sampled_from([0.0, 0.5]),
    st.booleans(),
    st.sampled_from(["fixed", "bernoulli"]),
    st.booleans(),
    st.sampled_from([0.0, 3600.0]),
    st.sampled_from(["sgd", "muon"]),
)
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path_factory, kills, schedule, alpha, train_wide, draw, within, save_every, optimizer
):
    recipe = dataclasses.replace(RECIPE, lr_schedule=schedule, optimizer=optimizer)
    folder = tmp_path_factory.mktemp("resume")
    assume(draw == "fixed" or train_wide)  # a batch that draws 1 throughout trains nothing else
    assume(not within or (schedule == "one_cycle" and train_wide))
    objective = Objective(draw=draw)

    def trained(name):
        made = model(alpha, train_wide)
        anneal = falls(made, alpha) if within else None
        file = folder / f"{name}.safetensors"
        return made, fit(made, TRAIN, VAL, recipe, "key", file, objective=objective, anneal=anneal)

    whole, expected = trained("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", save_every)  # after every step, or every epoch
        patch.setattr(torch.optim, "SGD", DiesAfter)
        patch.setattr(muon, "Muon", MuonDiesAfter)
        Dies.left = list(kills)
        for _ in range(len(kills) + 1):
            torch.rand(7)  # whatever else uses random numbers meanwhile
            try:
                resumed, outcome = trained("cut")
            except Killed:
                continue
            break
    same(outcome, expected, resumed, whole)


def test_a_recipe_says_which_optimizer_trains(tmp_path, monkeypatch):
    steps = []
    step = muon.Muon.step
    monkeypatch.setattr(muon.Muon, "step", lambda self, closure=None: (steps.append(0), step(self))[1])
    for name, taken in (("sgd", 0), ("muon", RECIPE.max_epochs * RECIPE.steps_an_epoch(len(TRAIN)))):
        recipe = dataclasses.replace(RECIPE, lr_schedule="one_cycle", optimizer=name)
        fit(model(), TRAIN, VAL, recipe, "key", tmp_path / f"{name}.safetensors")
        assert len(steps) == taken


def test_a_resume_that_forgets_the_random_state_would_be_caught(tmp_path, monkeypatch):
    objective = Objective(draw="bernoulli")
    whole = model()
    expected = fit(whole, TRAIN, VAL, RECIPE, "key", tmp_path / "whole.safetensors", objective=objective)
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(torch.optim, "SGD", DiesAfter)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    Dies.left = [4]  # in the second epoch
    with pytest.raises(Killed):
        fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "cut.safetensors", objective=objective)
    resumed = model()
    outcome = fit(resumed, TRAIN, VAL, RECIPE, "key", tmp_path / "cut.safetensors", objective=objective)
    with pytest.raises(AssertionError):
        same(outcome, expected, resumed, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", ["a step", "the end of an epoch", "the last epoch"])
def test_a_signal_stops_at_the_next_safe_point_and_nothing_is_lost(tmp_path, monkeypatch, number, at):
    whole = model()
    expected = fit(whole, TRAIN, VAL, RECIPE, "key", tmp_path / "whole.safetensors")
    calls = []

    def measure(epoch, accuracy):
        if (at, epoch) in {("the end of an epoch", 2), ("the last epoch", 4)}:
            os.kill(os.getpid(), number)
        return {}

    class Signalled(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            calls.append(0)
            if at == "a step" and len(calls) == 5:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(torch.optim, "SGD", Signalled)
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Interrupted, match="saved after") as stopped:
        fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "cut.safetensors", measure=measure)
    assert stopped.value.exit_code == 128 + number
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    done = len(calls)
    resumed = model()
    outcome = fit(resumed, TRAIN, VAL, RECIPE, "key", tmp_path / "cut.safetensors")
    same(outcome, expected, resumed, whole)
    assert len(calls) == expected.steps and done == {"a step": 5, "the end of an epoch": 6}.get(at, 12)


@pytest.mark.parametrize("damage", ["truncated", "empty", "a bit", "swapped"])
def test_a_damaged_state_is_named_and_the_one_before_taken(tmp_path, monkeypatch, damage):
    path, slots = tmp_path / "c.safetensors", [tmp_path / f"c.{i}.safetensors" for i in (0, 1)]
    whole = model()
    expected = fit(whole, TRAIN, VAL, RECIPE, "key", tmp_path / "whole.safetensors")
    monkeypatch.setattr(torch.optim, "SGD", DiesAfter)
    Dies.left = [7]  # two epochs are saved
    with pytest.raises(Killed):
        fit(model(), TRAIN, VAL, RECIPE, "key", path)
    newest = max(slots, key=lambda p: p.stat().st_mtime_ns)
    content = newest.read_bytes()
    if damage == "swapped":
        other = next(s for s in slots if s != newest)
        newest.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        flipped = content[:500] + bytes([content[500] ^ 1]) + content[501:]
        newest.write_bytes({"truncated": content[:1000], "empty": b"", "a bit": flipped}[damage])
    resumed = model()
    with pytest.warns(UserWarning, match=r"c\.[01]\.safetensors is damaged"):
        outcome = fit(resumed, TRAIN, VAL, RECIPE, "key", path)
    same(outcome, expected, resumed, whole)


def test_a_state_that_was_copied_from_another_stage_is_not_gone_on_from(tmp_path, monkeypatch):
    """With its checksum, and of a network of the same shape: only what it says of itself tells it apart."""
    whole = model()
    expected = fit(whole, TRAIN, VAL, RECIPE, "key", tmp_path / "whole.safetensors", identity="one")
    monkeypatch.setattr(torch.optim, "SGD", DiesAfter)
    Dies.left = [7]
    with pytest.raises(Killed):
        fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "c.safetensors", identity="another")
    begun = model()
    with pytest.warns(UserWarning, match="is of another stage"):
        outcome = fit(begun, TRAIN, VAL, RECIPE, "key", tmp_path / "c.safetensors", identity="one")
    same(outcome, expected, begun, whole)


def test_the_best_is_one_that_has_arrived_and_the_steps_are_known(tmp_path):
    made = model()
    recipe = dataclasses.replace(RECIPE, lr=1e-6, lr_schedule="one_cycle")  # it learns next to nothing
    outcome = fit(made, TRAIN, VAL, recipe, "key", tmp_path / "a.safetensors", anneal=falls(made, 0.0))
    assert outcome.best_epoch >= 2 and made.alpha == 0.0
    assert outcome.best_accuracy == evaluate(made, VAL)[1]
    with pytest.raises(UsageError, match="anneal needs lr_schedule 'one_cycle'"):
        fit(made, TRAIN, VAL, RECIPE, "key", tmp_path / "b.safetensors", anneal=falls(made, 0.0))


def test_log_points_that_are_read_late_say_the_same(tmp_path, monkeypatch):
    """As on a GPU: at the end of the epoch, or when a state is saved."""
    expected = fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "at once.safetensors")
    monkeypatch.setattr(train._State, "waits_to_read", True)
    whole = model()
    assert fit(whole, TRAIN, VAL, RECIPE, "key", tmp_path / "late.safetensors").history == expected.history
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(torch.optim, "SGD", DiesAfter)
    Dies.left = [4]  # in the second epoch, between two log points
    with pytest.raises(Killed):
        fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "cut.safetensors")
    resumed = model()
    same(fit(resumed, TRAIN, VAL, RECIPE, "key", tmp_path / "cut.safetensors"), expected, resumed, whole)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_where_epochs_are_short_a_state_of_some_epochs_ago_does(tmp_path, monkeypatch, epoch):
    monkeypatch.setattr(train._State, "waits_to_read", True)  # as on a GPU
    monkeypatch.setattr(train, "SAVE_BETWEEN", 3600.0)
    whole = model()
    expected = fit(whole, TRAIN, VAL, RECIPE, "key", tmp_path / "a.safetensors")
    assert len(list(tmp_path.glob("a.*.safetensors"))) == 1  # at its end

    def dies(outcome):
        if outcome.epochs == epoch:
            raise Killed

    with pytest.raises(Killed):
        fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "b.safetensors", dies)
    assert not list(tmp_path.glob("b.*"))
    again = model()
    same(fit(again, TRAIN, VAL, RECIPE, "key", tmp_path / "b.safetensors"), expected, again, whole)


def test_a_signal_while_no_state_was_due_saves_one(tmp_path, monkeypatch):
    monkeypatch.setattr(train._State, "waits_to_read", True)  # as on a GPU
    monkeypatch.setattr(train, "SAVE_BETWEEN", 3600.0)
    whole = model()
    expected = fit(whole, TRAIN, VAL, RECIPE, "key", tmp_path / "a.safetensors")

    def asks(outcome):
        if outcome.epochs == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="saved after epoch 2"):
        fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "b.safetensors", asks)
    assert list(tmp_path.glob("b.*"))
    again = model()
    same(fit(again, TRAIN, VAL, RECIPE, "key", tmp_path / "b.safetensors"), expected, again, whole)


def test_a_trivial_augmentation_is_resumed_within_an_epoch(tmp_path, monkeypatch):
    recipe = dataclasses.replace(RECIPE, augment="trivial", max_epochs=2)
    whole, cropped = model(), model()
    expected = fit(whole, TRAIN, VAL, recipe, "key", tmp_path / "a.safetensors")
    crop = dataclasses.replace(recipe, augment="crop")
    assert fit(cropped, TRAIN, VAL, crop, "key", tmp_path / "c.safetensors").history != expected.history
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(torch.optim, "SGD", DiesAfter)
    Dies.left = [4]
    with pytest.raises(Killed):
        fit(model(), TRAIN, VAL, recipe, "key", tmp_path / "b.safetensors")
    resumed = model()
    same(fit(resumed, TRAIN, VAL, recipe, "key", tmp_path / "b.safetensors"), expected, resumed, whole)


def test_the_last_weights_are_kept_where_that_is_asked_for(tmp_path):
    """At a rate that is too high the best epoch is not the last."""
    recipe = dataclasses.replace(RECIPE, lr=0.4, lr_schedule="one_cycle", max_epochs=4)
    kept = {}
    for keep in ("best", "last"):
        left = model()
        own = dataclasses.replace(recipe, keep=keep)
        outcome = fit(left, TRAIN, VAL, own, "key", tmp_path / f"{keep}.safetensors")
        reached = {r["epoch"]: r["value"] for r in outcome.history if (r["split"], r["metric"]) == ("val", "accuracy")}  # fmt: skip
        assert outcome.reached == reached[outcome.best_epoch] == evaluate(left, VAL)[1]
        kept[keep] = outcome
    assert kept["best"].history == kept["last"].history
    assert kept["last"].best_epoch == 4 != kept["best"].best_epoch
    assert kept["best"].reached > kept["last"].reached


def test_images_are_plain_in_the_last_epochs(tmp_path):
    trivial = dataclasses.replace(RECIPE, augment="trivial", max_epochs=2)
    recipes = [trivial, dataclasses.replace(trivial, augment_until=0.5)]
    until_the_end, half = (
        fit(model(), TRAIN, VAL, r, "key", tmp_path / f"{r.augment_until}.safetensors").history
        for r in recipes
    )
    first = [row for row in half if row["epoch"] <= 1]
    assert first == [row for row in until_the_end if row["epoch"] <= 1] and half != until_the_end


def test_a_state_is_not_gone_on_from_in_another_precision(tmp_path, monkeypatch):
    def dies(outcome):
        raise Killed

    with pytest.raises(Killed):
        fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "a.safetensors", dies)
    AcceleratorState._reset_state(True)  # of the process; there is one
    try:
        bf16 = Accelerator(mixed_precision="bf16", cpu=True)
        with pytest.warns(UserWarning, match="goes on from the state before"):
            fit(model(), TRAIN, VAL, RECIPE, "key", tmp_path / "a.safetensors", accelerator=bf16)
    finally:
        AcceleratorState._reset_state(True)


@pytest.mark.parametrize("precision", ["fp16", "half"])
def test_a_precision_that_a_cpu_has_not_is_one_line(monkeypatch, precision):
    monkeypatch.setenv(train.PRECISION, precision)
    with pytest.raises(
        UsageError, match=f"ACCELERATE_MIXED_PRECISION is '{precision}'; a CPU trains in bf16"
    ):
        train.accelerator_for_this_machine(cpu=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("distill", [0.0, 0.9])
def test_steps_replayed_from_a_graph_are_those_that_python_takes(tmp_path, monkeypatch, alpha, distill):
    whole, found = train.Gradients, []
    for capture in (False, True):
        made = []
        monkeypatch.setattr(
            train,
            "Gradients",
            lambda *a, capture=capture, made=made: made.append(whole(*a, capture)) or made[0],
        )
        checkpoint, teacher = tmp_path / f"{capture}.safetensors", model().network
        outcome = fit(
            model(alpha),
            TRAIN,
            VAL,
            RECIPE,
            "key",
            checkpoint,
            objective=Objective(distill=distill),
            teacher=teacher,
        )
        found.append([row["value"] for row in outcome.history if row["metric"] == "loss"])
        assert made[0].recorded == capture
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_which_steps_are_alike_is_known():
    made = model()
    assert Loss(Objective(), made, made).is_alike
    drawn = Loss(Objective(draw="bernoulli"), made, made)
    assert not drawn.is_alike
    made.alpha = 0.0  # nothing but 0 can be drawn
    assert drawn.is_alike


@pytest.mark.parametrize("save_every", [0.0, 3600.0])
def test_a_loss_that_explodes_is_found_late_too(tmp_path, monkeypatch, save_every):
    monkeypatch.setattr(train._State, "waits_to_read", True)
    monkeypatch.setattr(train, "SAVE_EVERY", save_every)
    wild = model(0.5)
    recipe = dataclasses.replace(RECIPE, lr=1e30, log_every=1)
    outcome = fit(wild, TRAIN, VAL, recipe, "key", tmp_path / "c.safetensors")
    assert outcome.diverged and outcome.epochs < 4
    assert all(torch.isfinite(torch.tensor(row["value"])) for row in outcome.history)
    assert all(torch.isfinite(v).all() for v in wild.state_dict().values())
    again = fit(model(0.5), TRAIN, VAL, recipe, "key", tmp_path / "c.safetensors")  # from the state on disk
    assert again.history == outcome.history and again.steps == outcome.steps


def test_another_key_gives_another_run(tmp_path):
    runs = [
        fit(model(), TRAIN, VAL, RECIPE, key, tmp_path / f"{key}.safetensors").history for key in ("a", "b")
    ]
    assert runs[0] != runs[1]


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


def test_what_trained_in_bf16_is_the_network_that_it_was(tmp_path):
    made, x = model(), torch.randn(2, 3, 32, 32)
    AcceleratorState._reset_state(True)  # of the process; there is one
    try:
        bf16 = Accelerator(mixed_precision="bf16", cpu=True)
        recipe = dataclasses.replace(RECIPE, max_epochs=1)
        fit(made, TRAIN, VAL, recipe, "key", tmp_path / "a.safetensors", accelerator=bf16)
    finally:
        AcceleratorState._reset_state(True)
    assert torch.equal(made(x), type(made).forward(made, x))  # in float32, and not still in bf16


def test_evaluating_leaves_each_module_in_the_mode_it_had():
    made = VGG([6, "M", 8, "M", 8, "M", "M", "M"]).train()
    made.features[1].eval()  # a BatchNorm that is held
    before = [m.training for m in made.modules()]
    evaluate(made, VAL)
    assert [m.training for m in made.modules()] == before


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize(
    ("read", "stride", "faulty"), [(5, 2, True), (8, 2, False), (1, 2, False), (5, 1, False)]
)
def test_a_faulty_kernel_is_gone_around_where_it_is(monkeypatch, capability, read, stride, faulty):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    network = nn.Sequential(nn.Conv2d(read, 11, 1, stride), nn.Conv2d(11, 3, 3, 2))
    with without_them(network):
        assert torch.backends.mkldnn.enabled == (not faulty or capability != "AVX2")
    assert torch.backends.mkldnn.enabled


def test_a_faulty_kernel_of_a_narrow_program_is_found(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for keep_ratio, faulty in ((0.34375, True), (0.5, False)):  # 16 channels: 5, and 8
        with without_them(ParallelModel(resnet20(), keep_ratio, torch.randn(2, 3, 32, 32))):
            assert torch.backends.mkldnn.enabled != faulty
