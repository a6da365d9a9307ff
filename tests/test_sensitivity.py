"""Widths by sensitivity: never dearer than uniform ones, wide where narrowing hurts."""

import warnings
from random import Random as Draws

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_any_network import PARTS, Random
from test_fold import scramble
from torch import nn

from alphaprune import ParallelModel, UsageError, plan
from alphaprune.initialise import TooFewImages
from alphaprune.models import resnet20, vgg16
from alphaprune.sensitivity import allot, damages

PLAIN = sorted(set(PARTS) - {"grouped residual"})


@example(["gate", "residual"], 0.5, 2, Draws(0))  # tied, with 24 and 12 channels
@example(["grouped"], 0.5, 2, Draws(0))  # three blocks
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(PLAIN), min_size=1, max_size=3),
    st.floats(0.3, 0.8),
    st.sampled_from([1, 1, 2, 3]),
    st.randoms(use_true_random=False),
)
def test_never_more_than_uniform_and_ties_are_kept(parts, keep_ratio, round_to, random):
    torch.manual_seed(0)
    network, x = Random(parts, [12] * (len(parts) + 1), "mean").eval(), torch.randn(2, 2, 8, 8)
    try:
        uniform = plan(network, keep_ratio, x, latency=False)
    except UsageError:
        return
    found = damages(network, torch.randn(40, 2, 8, 8), ratios=(0.5,))
    invented = {g: {0.2: random.random() + 1, 0.5: random.random(), 0.8: random.random() / 9} for g in found}
    try:
        ratios = allot(network, invented, keep_ratio, x, round_to=round_to)
    except UsageError as e:
        assert round_to > 1 and "too coarse" in str(e)
        return
    chosen = plan(network, ratios, x, latency=False)
    for cost in ("multiply_adds", "parameters"):
        assert chosen.share(cost) <= uniform.share(cost)
    model = ParallelModel(network, ratios, x)
    wide = {m.name: len(m.ids) for m in model.mixers}
    for group in found if round_to == 1 else ():  # one ratio a group, but a channel at least in each layer
        assert len({ratios[n] for n in group.split(", ") if ratios[n] * wide[n] > 1.5}) <= 1
    assert model.keep_ratio == ratios
    kept = [(len(model.widths.positions(m.ids)), len(m.ids)) for m in model.mixers if m.name in ratios]
    assert all(k % round_to == 0 or k == c for k, c in kept), kept


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(PLAIN), min_size=1, max_size=3), st.integers(0, 2**31))
def test_a_damage_is_what_one_model_with_that_group_narrowed_has(parts, seed):
    """Though what does not differ among groups and ratios is computed once for all."""
    torch.manual_seed(seed)
    network = Random(parts, [12] * (len(parts) + 1), "mean").double()
    scramble(network, seed)
    network, images = network.eval(), torch.randn(130, 2, 8, 8, dtype=torch.float64)
    expected = network(images).log_softmax(1)
    for group, curve in damages(network, images, ratios=(0.3, 0.7)).items():
        for ratio, damage in curve.items():
            shares = {name: ratio for name in group.split(", ")}
            model = ParallelModel(network, shares, images[:1], init="least_squares", images=images).eval()
            model.alpha = 0.0
            answers = model(images).log_softmax(1)
            alone = nn.functional.kl_div(answers, expected, reduction="batchmean", log_target=True).item()
            assert damage == pytest.approx(alone, rel=1e-6, abs=1e-10)


def test_a_layer_that_does_not_matter_is_narrowed_most_and_the_same_comes_out_each_time():
    torch.manual_seed(0)
    network = vgg16(0.125).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
    with torch.no_grad():
        network.features[37].weight[4:] = 0  # 4 of 64 channels say anything
        network.features[37].bias[4:] = 0
    x = torch.randn(200, 3, 32, 32)
    damage = {name: d for name, d in damages(network, x, ratios=(0.1, 0.5)).items()}
    assert list(damage)[-2] == "features.37" and len(damage) == 13
    assert damage["features.37"][0.1] < 0.1 * max(d[0.1] for d in damage.values())
    assert all(d[0.1] >= d[0.5] - 1e-6 for d in damage.values())
    ratios = allot(network, damage, 0.34375, x[:1])
    assert ratios["features.37"] <= 0.34375 < max(ratios.values())
    assert ratios == allot(network, damage, 0.34375, x[:1])


def test_roots_of_damages_spare_the_worst_layer_less():
    network, x = vgg16(0.25).eval(), torch.randn(1, 3, 32, 32)
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    damage = {name: {0.1: 1.0, 0.5: 0.04} for name in layers}
    worst = layers[5]
    damage[worst] = {0.1: 20.0, 0.5: 0.8}
    whole, root = (allot(network, damage, 0.2, x, power=power) for power in (1.0, 0.5))
    assert whole == allot(network, damage, 0.2, x)
    assert whole[worst] > root[worst] + 0.05
    uniform = plan(network, 0.2, x, latency=False)
    assert plan(network, root, x, latency=False).share("multiply_adds") <= uniform.share("multiply_adds")
    for power in (0.0, -1.0, 2.0, float("nan")):
        with pytest.raises(UsageError, match=r"power is .*; give a number in"):
            allot(network, damage, 0.2, x, power=power)


def test_multiples_cost_no_more_and_layers_are_rounded_up_as_well_as_down():
    network, x = vgg16(0.25).eval(), torch.randn(1, 3, 32, 32)
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    damage = {name: {0.2: 1.0 / (i + 1), 0.5: 0.3 / (i + 1)} for i, name in enumerate(layers)}
    uniform = plan(network, 0.34375, x, latency=False)
    ratios = allot(network, damage, 0.34375, x, round_to=8)
    rounded = plan(network, ratios, x, latency=False)
    kept = rounded.table["out_folded"][:-1]  # the last gives the classes
    assert (kept % 8 == 0).all() and kept.nunique() > 2
    assert (
        0.9 * uniform.share("multiply_adds")
        < rounded.share("multiply_adds")
        <= uniform.share("multiply_adds")
    )
    with pytest.raises(UsageError, match="round_to=16 is too coarse: 16 channels in every layer"):
        allot(network, damage, 0.2, x, round_to=16)
    with pytest.raises(UsageError, match="round_to is 0; give a whole number"):
        allot(network, damage, 0.2, x, round_to=0)


def test_tied_layers_are_one_group():
    network, x = resnet20(0.5).eval(), torch.randn(3, 3, 32, 32)
    lines: list[str] = []
    with pytest.warns(TooFewImages, match="3 were given") as said:
        groups = [g.split(", ") for g in damages(network, x, ratios=(0.5,), say=lines.append)]
    assert len(said) == 1 and len(lines) == 1 + len(groups)
    assert lines[0] == f"{len(groups)} groups of layers, each narrowed alone to 0.5 of its channels"
    assert lines[1].startswith(f"[1/{len(groups)}] {', '.join(groups[0])}: damage ")
    assert ["conv", "blocks.0.conv2", "blocks.1.conv2", "blocks.2.conv2"] in groups
    assert sum(map(len, groups)) == 21  # 19 convolutions of 3 x 3 and two shortcuts; the classifier stays


class Uneven(nn.Module):
    """Layers of 4, 60 and 64 channels that are tied."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, c, 3, padding=1) for c in (4, 60, 64))
        self.next, self.head = nn.Conv2d(64, 48, 3, padding=1), nn.Linear(48, 5)

    def forward(self, x):
        x = torch.relu(torch.cat((self.a(x), self.b(x)), 1) + self.c(x))
        return self.head(torch.relu(self.next(x)).mean((2, 3)))


@pytest.mark.parametrize("keep_ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("round_to", [1, 4])
def test_tied_layers_of_different_widths_cost_no_more_either(keep_ratio, round_to):
    network, x = Uneven().eval(), torch.randn(1, 3, 8, 8)
    damage = {"a, b, c": {0.2: 3.0, 0.5: 1.0}, "next": {0.2: 0.3, 0.5: 0.1}}
    ratios = allot(network, damage, keep_ratio, x, round_to=round_to)
    chosen = plan(network, ratios, x, latency=False)
    one = {name: max(keep_ratio, 0.3) if name == "a" else keep_ratio for name in ratios}
    uniform = plan(network, one, x, latency=False)
    for cost in ("multiply_adds", "parameters"):
        assert 0.75 * uniform.share(cost) < chosen.share(cost) <= uniform.share(cost)


def test_a_layer_of_49_channels_keeps_one_at_a_small_ratio():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 49, 3), nn.ReLU(), nn.Flatten(), nn.Linear(49 * 36, 4)).eval()
    found = damages(network, torch.randn(60, 3, 8, 8), ratios=(0.01, 0.5))
    assert found.keys() == {"0"} and found["0"][0.01] > found["0"][0.5]
    ratios = allot(network, found, 0.015, torch.randn(1, 3, 8, 8))
    assert plan(network, ratios, torch.randn(1, 3, 8, 8), latency=False).table["out_folded"].tolist() == [
        1,
        4,
    ]


def test_warnings_keep_their_kind_and_are_said_also_if_measuring_fails():
    network, x = resnet20(0.5).eval(), torch.randn(3, 3, 32, 32)

    def fails(line: str) -> None:
        if not line.startswith("["):  # what is said before the first group
            return
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.warns(TooFewImages) as said:
        damages(network, x, ratios=(0.5,), say=fails)
    assert {w.category for w in said} == {TooFewImages, DeprecationWarning}


def test_the_images_needed_are_the_most_that_any_width_needs():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)
    ).eval()
    x = torch.randn(20, 6)
    needed = []
    for ratios in ((0.9, 0.2), (0.9,)):
        with pytest.warns(TooFewImages) as said:
            damages(network, x, ratios=ratios)
        needed.append(said[0].message.needed)
    assert needed[0].keys() >= needed[1].keys()
    assert all(needed[0][name] >= n for name, n in needed[1].items())
