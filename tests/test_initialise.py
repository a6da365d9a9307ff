"""Where the branches start: selection and least squares, over random networks."""

import copy
import itertools
import warnings
from collections import defaultdict

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from test_any_network import PARTS, Random
from test_fold import scramble
from torch import nn
from torch.optim.swa_utils import update_bn

from alphaprune import ParallelModel, UsageError, fold
from alphaprune.initialise import TooFewImages, fit_branches
from alphaprune.models import resnet20, vgg16
from alphaprune.narrowing import torch_pruning
from alphaprune.widths import Widths

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
@example(101)  # a channel that the images never show
def test_twins_are_told_from_each_other_and_half_the_channels_give_the_same(seed):
    network, x = doubled(seed), torch.randn(40, 2, 8, 8, dtype=torch.float64)
    model = ParallelModel(network, 0.5, x[:2], init="least_squares", images=x)
    model.alpha = 0.0
    small, _ = fold(model)
    new = torch.randn(9, 2, 8, 8, dtype=torch.float64)
    # Least squares knows nothing of a channel that is 0 for all images it was given; where one is not, for a new one, its twin is lost.
    dead = [(network[:behind](x) == 0).all(0).all(-1).all(-1) for behind in (3, 6)]
    assume(all((network[:behind](new)[:, d] == 0).all() for behind, d in zip((3, 6), dead, strict=True)))
    expected = network(new)
    # The ridge, 1e-4, draws towards giving each twin back alone, so not to rounding.
    assert (small(new) - expected).abs().max() <= 0.05 * expected.abs().max()
    by_place = ParallelModel(network, 0.5, x[:2], init="select", images=x)
    by_place.alpha = 0.0
    far = (fold(by_place)[0](new) - expected).abs().max()
    # Where the network is all but dead for these images both are right, or nearly: a hundredth is within what the ridge costs.
    assert (small(new) - expected).abs().max() < max(far, 0.01 * expected.abs().max())


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


@CASES
@given(parts, st.sampled_from(["mean", "flatten"]), st.integers(0, 9), seeds)
def test_before_the_first_channel_that_goes_nothing_is_fitted_and_all_else_is_as_if_it_were(
    parts, head, which, seed
):
    """One layer narrowed, as the measurement of widths does for each."""
    network, x = network_and_images(parts, head, seed)
    layers = [m.name for m in ParallelModel(network, 1.0, x[:2]).mixers]
    ratios = {layers[which % len(layers)]: 0.5}

    def fitted():
        return ParallelModel(network, ratios, x[:2], init="least_squares", images=x)

    try:
        short = fitted()
    except UsageError as e:
        assert "different numbers" in str(e)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Widths, "all_stay", lambda self, node: False)
        whole = fitted()
    assert short.least_squares.keys() <= whole.least_squares.keys()
    assert all(
        whole.least_squares[name]["unread"] < 1e-12
        for name in whole.least_squares.keys() - short.least_squares.keys()
    )
    assert short.state_dict().keys() == whole.state_dict().keys()
    for a, b in zip(short.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@CASES
@given(parts, st.sampled_from(["mean", "flatten"]), seeds)
def test_models_are_fitted_side_by_side_as_each_alone(parts, head, seed):
    network, x = network_and_images(parts, head, seed)
    try:
        alone = [ParallelModel(network, r, x[:2], init="least_squares", images=x) for r in (0.35, 0.8)]
    except UsageError as e:
        assert "different numbers" in str(e)
        return
    together = [ParallelModel(network, m.widths, x[:2], init="select") for m in alone]
    for model, single, fit in zip(together, alone, fit_branches(together, [(x,)]), strict=True):
        assert fit.report == single.least_squares
        for a, b in zip(model.state_dict().values(), single.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        model.eval().alpha = 0.0
        expected = model(x)
        assert (fit.answers[0] - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_the_channels_of_another_model_of_the_network_can_be_given():
    network, x = network_and_images(["conv", "residual"], "mean", 1)
    first = ParallelModel(network, 0.5, x[:2], init="select", images=x)
    again = ParallelModel(network, first.widths, x[:2], init="select")
    assert torch.equal(first.widths.kept, again.widths.kept) and again.keep_ratio is None
    other, _ = network_and_images(["conv"], "mean", 1)
    with pytest.raises(UsageError, match="widths of a model of another network"):
        ParallelModel(other, first.widths, x[:2])


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


@pytest.mark.parametrize("make", [lambda: vgg16(0.125), lambda: resnet20(0.5)], ids=["VGG-16", "ResNet-20"])
@pytest.mark.parametrize("seed", range(2))
def test_selection_by_norm_is_torch_prunings_network_bit_for_bit(make, seed):
    torch.manual_seed(seed)
    network, x = make().eval(), torch.randn(8, 3, 32, 32)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight)
            nn.init.normal_(layer.running_mean)
    structure = ParallelModel(network, 0.5, x).structure
    tied = {name: line for line in structure.tied() for name in line.split(", ")}
    share = defaultdict(
        lambda: int(torch.randint(2, 8, ())) / 8 + 0.01
    )  # of layers of 8 channels and multiples
    by_layer = {m.name: share[tied.get(m.name, m.name)] for m in structure.layers() if m.name != "classifier"}
    for ratio in (0.5, by_layer):
        model = ParallelModel(network, ratio, x, init="select", images=x, select_by="norm")
        model.alpha = 0.0
        small, theirs = fold(model)[0], torch_pruning(network, ratio, "l2", x[:1])
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in small.state_dict().items())
        by_variance = ParallelModel(network, ratio, x, init="select", images=x)
        by_variance.alpha = 0.0
        assert not torch.equal(by_variance(x), theirs(x))


@pytest.mark.parametrize(
    ("mixer", "channels", "part"),
    [  # what makes, filters, scales and reads channel c
        ("0", 12, lambda n, c: n[0].weight[c // 6 * 4 : c // 6 * 4 + 4, c % 6]),
        ("0", 12, lambda n, c: n[2].weight[c]),
        ("0", 12, lambda n, c: n[3].weight[c : c + 1]),
        ("0", 12, lambda n, c: n[4].weight[c // 4 * 2 : c // 4 * 2 + 2, c % 4]),
        ("4", 6, lambda n, c: n[6].weight[:, c * 16 : c * 16 + 16]),
    ],
    ids=["transposed", "depthwise", "PReLU", "grouped", "flattened"],
)
def test_a_channel_with_large_weights_stays_whichever_it_is(mixer, channels, part):
    """Half of them stay, so that none of this holds by itself for all."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.ConvTranspose2d(8, 12, 1, groups=2), nn.ReLU(), nn.Conv2d(12, 12, 1, groups=12), nn.PReLU(12),
        nn.Conv2d(12, 6, 1, groups=3), nn.Flatten(), nn.Linear(6 * 16, 5),
    )  # fmt: skip
    for c in range(channels):
        changed = copy.deepcopy(network)
        with torch.no_grad():
            part(changed, c).mul_(1000)
        model = ParallelModel(changed, 0.5, torch.randn(2, 8, 4, 4), init="select")
        ids = next(m.ids for m in model.mixers if m.name == mixer)
        kept = model.widths.positions(ids).tolist()
        assert c in kept and len(kept) == channels // 2


def test_what_is_refused_and_what_is_said():
    network, x = network_and_images(["conv"], "mean", 1)
    with pytest.raises(UsageError, match="init is 'best'; use random, select, least_squares"):
        ParallelModel(network, 0.5, x, init="best")
    with pytest.raises(UsageError, match="select_by is 'size'; use variance, norm"):
        ParallelModel(network, 0.5, x, init="select", select_by="size")
    with pytest.raises(UsageError, match="select_by='norm' is for init='select' and init='least_squares'"):
        ParallelModel(network, 0.5, x, select_by="norm")
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


class Groups(nn.Module):
    """A grouped convolution of which one group reads 8 living channels and the other 1, in this order or the other."""

    def __init__(self, order, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.before = nn.Conv2d(2, 12, 1), nn.Conv2d(12, 16, 1)
        self.grouped, self.head = nn.Conv2d(16, 16, 1, groups=2), nn.Linear(16, 5)
        with torch.no_grad():
            self.before.bias[:9] += 1.0
            self.before.bias[9:] = -100.0
            for t in (*self.before.parameters(), *self.grouped.parameters()):
                t.copy_(torch.cat([t.chunk(2)[i] for i in order]))

    def forward(self, x):
        x = torch.relu(self.before(torch.relu(self.first(x))))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


@pytest.mark.parametrize("seed", range(3))
def test_too_few_images_for_one_group_are_not_too_few_for_the_next(seed):
    x = torch.randn(14, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for order in ((0, 1), (1, 0)):
        network = Groups(order, seed).double().eval()
        with pytest.warns(TooFewImages):
            model = ParallelModel(
                network, {"first": 0.25, "before": 0.5}, x[:2], init="least_squares", images=x
            )
        found.append(model.least_squares["grouped"])
    assert found[0]["ridge"] == found[1]["ridge"] == 1.0
    assert found[0]["unread"] == pytest.approx(found[1]["unread"], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.1, 0.3, 7.3])
def test_a_layer_that_does_not_vary_is_left_as_selection_has_it(dtype, value):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(),
        nn.LazyLinear(5),
    )  # fmt: skip
    x = torch.randn(300, 3, 16, 16)
    network(x[:1])
    with torch.no_grad():
        network[0].bias.fill_(-100.0)
        network[2].bias.copy_(value * torch.arange(1, 17))
    network, x = network.to(dtype).eval(), x.to(dtype)
    fitted, selected = (
        ParallelModel(network, 0.5, x[:2], init=i, images=x) for i in ("least_squares", "select")
    )
    for m in fitted.mixers:
        if m.name in ("2", "4"):
            assert torch.equal(fitted.reduce[m.key].weight, selected.reduce[m.key].weight), m.name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_moments_are_formed_in_32(dtype):
    torch.manual_seed(0)
    network, x = vgg16(0.125), torch.randn(200, 3, 32, 32)
    scramble(network, 0)
    reached = {}
    for kind in (torch.float32, dtype):
        model = ParallelModel(
            network.to(kind).eval(), 0.5, x[:2].to(kind), init="least_squares", images=x.to(kind)
        )
        reached[kind] = {name: (f["unread"], f.get("lost", 0.0)) for name, f in model.least_squares.items()}
    for name, whole in reached[torch.float32].items():
        assert reached[dtype][name] == pytest.approx(whole, rel=0.1, abs=0.01), name


class Two(nn.Module):
    """Two inputs of the same shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x, y):
        return self.head(torch.relu(self.a(x) + self.b(y)).mean((2, 3)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda x: x, "images hold 1 input, example_input 2; give as many"),
        (lambda x: (x, x, x), "images hold 3 inputs, example_input 2; give as many"),
        (lambda x: (x, x[:3]), r"images hold 8 and 3 images; give as many of each"),
        (lambda x: (x, x.to("meta")), "images are on meta, example_input on cpu; move one to the other"),
    ],
)
def test_images_like_the_example(images, message):
    x = torch.randn(8, 3, 8, 8)
    with pytest.raises(UsageError, match=message) as caught:
        ParallelModel(Two(), 0.5, (x[:2], x[:2]), init="select", images=images(x))
    assert "\n" not in str(caught.value)
    assert ParallelModel(Two(), 0.5, (x[:2], x[:2]), init="select", images=(x, x)).keep_ratio == 0.5


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
@torch.no_grad()
def test_torchvisions_networks_start_nearer_to_what_they_were_and_fold_exactly(name):
    torch.manual_seed(0)
    network, x = torchvision.models.get_model(name, num_classes=20), torch.randn(32, 3, 64, 64)
    update_bn([x], network)  # random weights, but statistics that belong to them
    expected = network.eval()(x)
    off = {}
    for init, images in (("random", None), ("least_squares", x)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TooFewImages)
            model = ParallelModel(network, 0.75, x[:2], init=init, images=images).eval()
        model.alpha = 0.0
        off[init] = float((model(x) - expected).norm() / (expected - expected.mean(0)).norm())
    assert off["least_squares"] < 0.8 * off["random"], off
    certificate = fold(model, x[:8])[1]
    assert certificate.exact, str(certificate)
