"""Where the branches start: selection and least squares, over random networks."""

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_any_network import PARTS, Random
from test_fold import scramble
from torch import nn

from alphaprune import ParallelModel, UsageError, fold
from alphaprune.initialise import TooFewImages

CASES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
parts = st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=4)
seeds = st.integers(0, 2**31)


def network_and_images(parts, head, seed, width=12):
    torch.manual_seed(seed)
    network = Random(parts, [width] * (len(parts) + 1), head).double()
    scramble(network, seed)
    return network.eval(), torch.randn(12, 2, 8, 8, dtype=torch.float64)


@CASES
@given(parts, st.sampled_from(["mean", "flatten"]), st.sampled_from(["select", "least_squares"]), seeds)
def test_where_all_channels_stay_the_narrow_program_is_the_network(parts, head, init, seed):
    network, x = network_and_images(parts, head, seed)
    model = ParallelModel(network, 1.0, x[:2], init=init, images=x).eval()
    expected = network(x)
    for alpha in (0.0, 0.5):
        model.alpha = alpha
        assert (model(x) - expected).abs().max() <= 1e-8 * expected.abs().max()


@CASES
@given(parts, st.sampled_from(["mean", "flatten"]), seeds)
def test_every_init_folds_exactly(parts, head, seed):
    network, x = network_and_images(parts, head, seed)
    for init in ("select", "least_squares"):
        try:
            model = ParallelModel(network, 0.5, x[:2], init=init, images=x)
        except UsageError as e:
            assert "different numbers" in str(e)
            return
        model.alpha = 0.0
        small, certificate = fold(model, x)
        assert certificate.exact
        assert all(p.isfinite().all() for p in small.parameters())


@CASES
@given(parts, seeds)
def test_the_larger_the_ridge_the_nearer_to_selection(parts, seed):
    """Of the layer that is fitted first, since what the others read differs with its fit."""
    network, x = network_and_images(parts, "mean", seed)
    try:
        selected = ParallelModel(network, 0.5, x[:2], init="select", images=x)
    except UsageError as e:
        assert "different numbers" in str(e)
        return
    away = []
    for ridge in (1e-4, 1e-2, 1.0, 1e6):
        model = ParallelModel(network, 0.5, x[:2], init="least_squares", images=x, ridge=ridge)
        first = next(iter(model.least_squares), None)
        key = next((m.key for m in model.mixers if m.name == first and m.key in model.expand), None)
        if key is None:
            return
        away.append((model.expand[key].weight - selected.expand[key].weight).norm().item())
    assert all(near <= far + 1e-9 for far, near in itertools.pairwise(away))
    assert away[-1] <= 1e-3 * max(away[0], 1.0)


@pytest.mark.parametrize("ridge", [0, -0.1, float("nan"), float("inf"), True, "0.1", 1e7])
def test_a_ridge_out_of_range_is_named(ridge):
    network, x = network_and_images(["conv"], "mean", 0)
    with pytest.raises(UsageError, match=r"ridge is .*; give a number above 0, such as 0.1"):
        ParallelModel(network, 0.5, x[:2], init="least_squares", images=x, ridge=ridge)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"init": "select", "ridge": 0.1}, "ridge is for"), ({"images": True}, "images are for")],
)
def test_what_the_init_does_not_use_is_refused(given, message):
    network, x = network_and_images(["conv"], "mean", 0)
    with pytest.raises(UsageError, match=message):
        ParallelModel(network, 0.5, x[:2], **given | {"images": x})


@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_layers_that_are_dead_for_all_images_stay_finite(bias):
    torch.manual_seed(0)
    convs = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    network = nn.Sequential(*convs, nn.Linear(8 * 4, 5)).double().eval()
    nn.init.constant_(network[0].bias, -100.0)
    nn.init.constant_(network[2].bias, bias)
    x = torch.randn(40, 2, 8, 8, dtype=torch.float64)
    model = ParallelModel(network, 0.5, x[:2], init="least_squares", images=x)
    model.alpha = 0.0
    small, certificate = fold(model, x)
    assert torch.isfinite(small(x)).all() and certificate.exact
    if bias:  # what is constant is told by R's bias-free channels that stay
        assert (small(x) - network(x)).abs().max() < 1e-6


def doubled(seed):
    """A network in which every channel has a twin."""
    torch.manual_seed(seed)
    convs = [
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 3),
        nn.BatchNorm2d(10),
        nn.ReLU(),
    ]
    network = nn.Sequential(*convs, nn.Flatten(), nn.Linear(10 * 16, 5)).double().eval()
    scramble(network, seed)
    for i in (0, 3):
        order = torch.randperm(network[i].out_channels)
        a, b = order.chunk(2)
        for layer in (network[i], network[i + 1]):
            for t in layer.state_dict().values():
                if t.dim():
                    t[b] = t[a]
    return network


@CASES
@given(seeds)
def test_twins_are_told_from_each_other_and_half_the_channels_give_the_same(seed):
    network, x = doubled(seed), torch.randn(40, 2, 8, 8, dtype=torch.float64)
    model = ParallelModel(network, 0.5, x[:2], init="least_squares", images=x)
    model.alpha = 0.0
    small, _ = fold(model)
    new, expected = torch.randn(9, 2, 8, 8, dtype=torch.float64), None
    expected = network(new)
    # The ridge, 1e-4, draws towards giving each twin back alone, so not to rounding.
    assert (small(new) - expected).abs().max() <= 0.05 * expected.abs().max()
    by_place = ParallelModel(network, 0.5, x[:2], init="select", images=x)
    by_place.alpha = 0.0
    far = (fold(by_place)[0](new) - expected).abs().max()
    # Where the network is dead for these images both are right, or nearly.
    assert (small(new) - expected).abs().max() < max(far, 1e-5 * expected.abs().max())


def test_least_squares_says_what_it_does_not_reach_and_comes_nearer_than_selection():
    network, x = network_and_images(["conv", "residual", "squeeze"], "mean", 3)
    x = torch.randn(60, 2, 8, 8, dtype=torch.float64)
    distance = {}
    for init in ("random", "select", "least_squares"):
        seen = None if init == "random" else x
        model = ParallelModel(network, 0.5, x[:2], init=init, images=seen).eval()
        model.alpha = 0.0
        distance[init] = (model(x) - network(x)).square().mean().item()
    assert distance["least_squares"] < distance["select"] < distance["random"]
    assert model.least_squares.keys() == {m.name for m in model.mixers if m.key in model.expand}
    assert all(0 <= found["unread"] < 1 and found["ridge"] == 1e-4 for found in model.least_squares.values())


def test_the_network_its_mode_and_the_random_numbers_stay():
    network, x = network_and_images(["conv", "depthwise"], "mean", 5)
    before = copy.deepcopy(network.state_dict())
    network.train()
    models = [ParallelModel(network, 0.5, x[:2], init="least_squares", images=x) for _ in range(2)]
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    states = [m.state_dict() for m in models]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_selection_without_images_goes_by_the_weights():
    network, x = network_and_images(["conv"], "mean", 7)
    with torch.no_grad():
        network.body[0].weight[3:9] *= 100
    model = ParallelModel(network, 0.5, x[:2], init="select")
    taken = model.reduce[model.mixers[0].key].weight.argmax(1)
    assert taken.tolist() == [3, 4, 5, 6, 7, 8]


def test_what_is_refused_and_what_is_said():
    network, x = network_and_images(["conv"], "mean", 1)
    with pytest.raises(UsageError, match="init is 'best'; use random, select, least_squares"):
        ParallelModel(network, 0.5, x, init="best")
    with pytest.raises(UsageError, match="'least_squares' needs images"):
        ParallelModel(network, 0.5, x, init="least_squares")
    dense = nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)
    ).double()
    few = torch.randn(4, 6, dtype=torch.float64)
    with pytest.warns(
        TooFewImages, match="too few images for the least squares at 2, 4: 4 were given"
    ) as said:
        model = ParallelModel(dense, 0.5, few, init="least_squares", images=few)
    assert {found["ridge"] for found in model.least_squares.values()} == {1.0}
    enough = torch.randn(max(said[0].message.needed.values()), 6, dtype=torch.float64)
    assert len(enough) <= 4 * 40  # channels of the widest layer, some of them always 0
    model = ParallelModel(dense, 0.5, few, init="least_squares", images=enough.repeat(2, 1))
    assert {found["ridge"] for found in model.least_squares.values()} == {
        1e-4
    }  # twice as many, as more are alive
