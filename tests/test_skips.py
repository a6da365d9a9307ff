"""Skip connections annealed away: the network at alpha 1, a plain chain at alpha 0, exact both times."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fold import scramble
from torch import nn
from torchvision.models import resnet18

from alphaprune import ParallelModel, UsageError, fold
from alphaprune.measure import parameters
from alphaprune.models import ResNet, resnet20, vgg16
from alphaprune.skips import SkipModel, remove_skips

IMAGES = torch.zeros(2, 3, 32, 32)


def gated(network, x, alpha):
    """The same by hand, for this project's ResNet."""
    x = network.relu(network.bn(network.conv(x)))
    for b in network.blocks:
        z = b.bn2(b.conv2(b.relu(b.bn1(b.conv1(x)))))
        x = b.relu(z + alpha * b.shortcut(x))
    return network.classifier(network.flatten(network.pool(x)))


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(3, 9), min_size=3, max_size=3),
    st.integers(1, 2),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_the_blend_is_the_formula_and_removal_is_exact(channels, blocks, alpha, seed):
    torch.manual_seed(seed)
    network = ResNet(channels, blocks, classes=5).double().eval()
    scramble(network, seed)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    model = SkipModel(network, x).eval()
    assert len(model.shortcuts) == 3 * blocks
    assert torch.equal(model(x), network(x))
    model.alpha = alpha
    torch.testing.assert_close(model(x), gated(network, x, alpha), rtol=1e-9, atol=1e-9)
    model.alpha = 0.0
    plain, certificate = remove_skips(model, x)
    assert certificate.exact
    torch.testing.assert_close(plain(x), gated(network, x, 0.0), rtol=1e-9, atol=1e-9)
    assert not any("shortcut" in name for name, _ in plain.named_modules())


def test_without_shortcuts_it_can_be_pruned_like_any_network():
    model = SkipModel(resnet20(), IMAGES)
    model.alpha = 0.0
    plain, _ = remove_skips(model, IMAGES)
    assert (
        parameters(plain) == 272_474 - 16 * 32 - 2 * 32 - 32 * 64 - 2 * 64
    )  # the two projections and their norms
    narrow = ParallelModel(plain, 0.5, IMAGES)
    narrow.alpha = 0.0
    small, certificate = fold(narrow)
    assert certificate.exact and parameters(small) < 0.3 * parameters(plain)
    assert narrow.structure.tied() == []


def test_modes_and_copies():
    model = SkipModel(resnet18(num_classes=4), torch.zeros(2, 3, 64, 64))
    model.alpha = 0.5
    model.train()(torch.randn(4, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    x = torch.randn(2, 3, 64, 64)
    other = copy.deepcopy(model.eval())
    assert torch.equal(other(x), model(x)) and torch.equal(model(x), model(x))
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.equal(other(x), model(x))


def test_bad_input_is_named():
    with pytest.raises(UsageError, match="VGG has no shortcut"):
        SkipModel(vgg16(0.125), IMAGES)
    model = SkipModel(resnet20(), IMAGES)
    with pytest.raises(UsageError, match=r"alpha is 1\.0, the shortcuts still count"):
        remove_skips(model, IMAGES)
    _, certificate = remove_skips(model, torch.randn(4, 3, 32, 32), force=True)
    assert not certificate.exact
    for alpha in (-1, 2, "0", None, True):
        with pytest.raises(UsageError, match="alpha"):
            model.alpha = alpha


def test_an_addition_with_a_factor_is_left_as_it_is():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            x = torch.add(self.a(x), x, alpha=0.5)
            return self.b(x) + x

    network, x = Half().eval(), torch.randn(2, 3, 8, 8)
    model = SkipModel(network, x).eval()
    assert len(model.shortcuts) == 1 and torch.equal(model(x), network(x))


def test_parallel_branches_of_equal_length_are_no_shortcut():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    with pytest.raises(UsageError, match="Two has no shortcut"):
        SkipModel(Two(), IMAGES)


def test_shortcuts_that_start_at_a_sum():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.h = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            x = x + self.f(x)
            x = x + self.g(x)
            return torch.add(self.h(x), x)

    torch.manual_seed(0)
    network, x = Chain().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = SkipModel(network, x).eval()
    assert len(model.shortcuts) == 3 and torch.equal(model(x), network(x))
    model.alpha = 0.3
    expected = x
    for layer in (network.f, network.g, network.h):
        expected = layer(expected) + 0.3 * expected
    torch.testing.assert_close(model(x), expected)
    model.alpha = 0.0
    plain, certificate = remove_skips(model, x)
    assert certificate.exact
    torch.testing.assert_close(plain(x), network.h(network.g(network.f(x))))


def test_a_sum_whose_shortcut_is_its_own_main_path():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.s = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x):
            y = self.b(self.a(x))
            return (y + self.s(x)) + y

    network, x = Again().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model = SkipModel(network, x).eval()
    y, s = network.b(network.a(x)), network.s(x)
    for alpha in (1.0, 0.5, 0.0):
        model.alpha = alpha
        torch.testing.assert_close(model(x), y + alpha * s + alpha * y)
