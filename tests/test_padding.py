"""Channels of zeros: the same function from layers that fill whole registers, or layers as they were."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_any_network import HEADS, PARTS_AND_WIDTHS, Random
from torch import nn
from torch.nn import functional as F
from torchvision.models import densenet121, efficientnet_b0, resnet18

from alphaprune import UsageError, fold, optimise_for_inference, padding
from alphaprune.padding import pad_channels
from alphaprune.parallel import ParallelModel
from alphaprune.trace import MIXING_LAYERS, trace


def settle(network: nn.Module) -> nn.Module:
    """Statistics and factors in its BatchNorms that are not 0 and 1."""
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return network.eval()


def widths(network: nn.Module) -> list[int]:
    layers = [m for m in network.modules() if isinstance(m, MIXING_LAYERS)]
    return [m.out_features if isinstance(m, nn.Linear) else m.out_channels for m in layers]


def small(network: nn.Module, keep_ratio: float, side: int = 64) -> nn.Module:
    """Folded: widths such as 22, 44, 88 and 176 of 64 to 512."""
    model = ParallelModel(settle(network), keep_ratio, torch.randn(2, 3, side, side))
    model.alpha = 0.0
    return settle(fold(model)[0])


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_random_networks_with_zeros_are_the_same_function(monkeypatch):
    """Without the comparison behind it, which would take the network as it was where this one is another."""
    monkeypatch.setattr(padding, "MOST", 100.0)
    grown = []

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(PARTS_AND_WIDTHS, HEADS, st.sampled_from([3, 8, 16]), st.integers(0, 2**31))
    def check(parts_and_widths, head, multiple, seed):
        torch.manual_seed(seed)
        network = settle(Random(*parts_and_widths, head).double())
        x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
        larger = copy.deepcopy(network)
        pad_channels(trace(larger, x), multiple)
        found, expected = larger(x), network(x)
        if head == "maps":
            found, expected = found["maps"], expected["maps"]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        grown.append(size(larger) > size(network))

    check()
    assert sum(grown) > len(grown) / 4, grown  # it is about networks that got some


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("conv", [8, 8]),
        ("residual", [8, 8, 8]),
        ("squeeze", [8, 8, 8]),
        ("depthwise", [8, 8]),
        ("twice", [8, 8]),
        ("up and down", [8, 8, 8]),
        # What is divided in two, shuffled or joined, in groups, normalised over channels, or a function's stays.
        ("gate", [8, 12]),
        ("dense", [6, 6]),
        ("shuffle", [8, 6, 6]),
        ("last norm", [6, 16, 6]),
        ("grouped", [8, 12, 18]),
        ("functional", [6]),
        ("norm functions", [8, 12, 6]),
    ],
)
def test_layers_get_more_where_all_that_they_meet_can_take_them(part, expected, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(padding, "MOST", 100.0)
    network = settle(Random([part], [6, 6], "flatten"))
    pad_channels(trace(network, torch.randn(2, 2, 8, 8)), 8)
    assert widths(network) == [*expected, 5]  # five classes


@pytest.mark.parametrize(
    ("make", "expected"),
    [(resnet18, {24, 48, 88, 176, 1000}), (densenet121, None), (efficientnet_b0, None)],
)  # fmt: skip
def test_networks_of_torchvision(make, expected):
    torch.manual_seed(0)
    network, x = small(make(), 0.34375), torch.randn(2, 3, 64, 64)
    fast = optimise_for_inference(network, x, pad_to=8)
    others = torch.randn(3, 3, 64, 64)
    wanted = network(others)
    torch.testing.assert_close(fast(others), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert (
        sum(widths(fast)) > sum(widths(optimise_for_inference(network, x, pad_to=1))) == sum(widths(network))
    )
    assert expected is None or set(widths(fast)) == expected


def test_no_more_than_a_tenth_is_added():
    network = settle(nn.Sequential(nn.Conv2d(3, 33, 3), nn.ReLU(), nn.Conv2d(33, 66, 3), nn.Conv2d(66, 5, 3)))
    x = torch.randn(2, 3, 8, 8)
    assert widths(optimise_for_inference(network, x, pad_to=8)) == [33, 72, 5]
    assert widths(optimise_for_inference(network, x, pad_to=1)) == [33, 66, 5]


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 15, 3), nn.Conv2d(15, 4, 3)
        nn.init.constant_(self.a.bias, 10.0)  # far from zero

    def forward(self, x):
        return self.b(self.between(self.a(x)))

    def between(self, x):
        return F.relu(x)


class CountsItsChannels(TwoLayers):
    def between(self, x):
        return x / x.size(1)


class DividesByWhatMayBeZero(TwoLayers):
    def between(self, x):
        return torch.rsqrt(F.relu(x))


class DividesByItself(TwoLayers):
    def between(self, x):
        return x / F.relu(x)


class GivesPlaces(TwoLayers):
    """Whole numbers, which a NaN in every logit would leave as good as any."""

    def forward(self, x):
        return super().forward(x).argmax(1)


class JoinsAlongACountedDimension(TwoLayers):
    """Not read by what follows channels, and no reason to fail."""

    def forward(self, x):
        y = self.a(x)
        return self.b(torch.cat([y, y], y.dim() - 4).chunk(2)[0])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [CountsItsChannels, DividesByWhatMayBeZero, DividesByItself, GivesPlaces, JoinsAlongACountedDimension],
)
def test_where_zeros_would_change_what_is_computed_there_are_none(make, dtype):
    torch.manual_seed(0)
    network, x = settle(make()), torch.randn(2, 3, 8, 8)
    fast = optimise_for_inference(network, x, dtype, pad_to=16)
    assert widths(fast) == [15, 4]
    found, expected = fast(x), network(x)
    torch.testing.assert_close(
        found, expected, rtol=0, atol=1e-4 if dtype is None else 0.1 * float(expected.max())
    )


def test_where_nothing_is_changed_by_them_there_are_some():
    network, x = settle(TwoLayers()), torch.randn(2, 3, 8, 8)
    assert widths(optimise_for_inference(network, x, pad_to=16)) == [16, 4]


def test_a_number_for_each_entry_behind_a_flatten_comes_too():
    torch.manual_seed(0)
    network = settle(
        nn.Sequential(
            nn.Conv2d(3, 15, 3), nn.Flatten(), nn.BatchNorm1d(15 * 36), nn.ReLU(), nn.Linear(15 * 36, 30), nn.PReLU(30), nn.Linear(30, 4)
        )
    )  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    fast = optimise_for_inference(network, x, pad_to=16)
    assert widths(fast) == [16, 32, 4]
    torch.testing.assert_close(fast(x), network(x), rtol=1e-4, atol=1e-5)


def test_the_default_goes_by_the_registers_of_the_cpu(monkeypatch):
    network, x = (
        settle(nn.Sequential(nn.Conv2d(3, 22, 3), nn.ReLU(), nn.Conv2d(22, 4, 3))),
        torch.randn(2, 3, 8, 8),
    )
    for capability, k in (("AVX2", 24), ("AVX512", 22), ("DEFAULT", 22)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda named=capability: named)
        assert widths(optimise_for_inference(network, x)) == [k, 4]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert widths(optimise_for_inference(network, x, torch.bfloat16)) == [22, 4]  # not measured
    assert widths(optimise_for_inference(network.double(), x.double())) == [22, 4]


@pytest.mark.parametrize("multiple", [0, -8, 2.0, True, "8"])
def test_a_multiple_that_is_none_is_refused(multiple):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(UsageError, match=r"pad_to is .*; give a multiple of channels, such as 8"):
        optimise_for_inference(network, torch.randn(2, 3, 8, 8), pad_to=multiple)
