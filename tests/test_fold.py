"""Lockstep and folding: the identities that everything rests on, over random networks and weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from alphaprune import ParallelModel, UsageError, fold
from alphaprune.measure import multiply_adds, parameters
from alphaprune.models import VGG, vgg16

SLOW = settings(max_examples=20, deadline=None)
layers = st.lists(st.one_of(st.integers(3, 24), st.just("M")), min_size=3, max_size=7).filter(
    lambda cs: sum(c != "M" for c in cs) >= 2 and cs.count("M") <= 3
)


def scramble(network: nn.Module, seed: int) -> None:
    """Weights and BatchNorm statistics that no training would produce."""
    g = torch.Generator().manual_seed(seed)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for t, (low, high) in {
                m.running_mean: (-2, 2),
                m.running_var: (0.05, 3),
                m.weight.data: (-2, 2),
                m.bias.data: (-1, 1),
            }.items():
                t.copy_(torch.rand(t.shape, generator=g, dtype=t.dtype) * (high - low) + low)


class Flat(nn.Module):
    """A VGG whose classifier reads several positions a channel: channels, then a flatten of a 4 x 4 map."""

    def __init__(self, channels):
        super().__init__()
        self.body = VGG([*channels, "M"], in_channels=2).features
        side = 16 // 2 ** ([*channels, "M"].count("M"))
        last = [c for c in channels if c != "M"][-1]
        self.norm = nn.BatchNorm1d(last * side * side)
        self.hidden, self.drop, self.out = (
            nn.Linear(last * side * side, 12),
            nn.Dropout(0.5),
            nn.Linear(12, 7),
        )

    def forward(self, x):
        x = self.norm(torch.flatten(F.relu(self.body(x), inplace=True), 1))
        return self.out(self.drop(torch.relu(self.hidden(x))))


def build(channels, keep_ratio, seed, dtype):
    torch.manual_seed(seed)
    network = Flat(channels).to(dtype)
    x = torch.randn(3, 2, 16, 16, dtype=dtype)
    model = ParallelModel(network, keep_ratio, x)
    scramble(model, seed)
    return model.eval(), x


@SLOW
@given(layers, st.floats(0.34, 1), st.integers(0, 2**31))
def test_folded_equals_unfolded_in_float64(channels, keep_ratio, seed):
    model, x = build(channels, keep_ratio, seed, torch.float64)
    model.alpha = 0.0
    small, certificate = fold(model)
    model.composed = False
    expected = model(x)
    assert (small(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert certificate.exact and certificate.agreement == 1
    assert type(small) is Flat
    assert len(certificate.layers) == sum(c != "M" for c in channels) + 1  # every mixer but the last


@SLOW
@given(layers, st.integers(0, 2**31))
def test_folded_equals_unfolded_in_float32(channels, seed):
    model, x = build(channels, 0.5, seed, torch.float32)
    model.alpha = 0.0
    small, _ = fold(model)
    expected = model(x)
    assert (small(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@SLOW
@given(layers, st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0, "mixed"]))
def test_composed_and_plain_form_have_the_same_outputs_and_gradients(channels, seed, alpha):
    model, x = build(channels, 0.5, seed, torch.float64)
    mixers = [m for m in model.mixers if m.key in model.expand]
    model.alpha = [(0.0, 1.0, 0.4)[(seed + i) % 3] for i in range(len(mixers))] if alpha == "mixed" else alpha
    results = []
    for composed in (True, False):
        model.composed = composed
        model.zero_grad()
        model(x).square().sum().backward()
        results.append(
            (model(x), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (a, grads_a), (b, grads_b) = results
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert grads_a.keys() == grads_b.keys()
    for name in grads_a:
        torch.testing.assert_close(
            grads_a[name], grads_b[name], rtol=1e-7, atol=1e-7 * float(grads_b[name].abs().max() + 1)
        )


@SLOW
@given(layers, st.integers(0, 2**31), st.floats(0, 1))
def test_the_blend_is_the_formula(channels, seed, alpha):
    """The second mixer reads alpha * wide + (1 - alpha) * E(narrow), computed here by hand."""
    model, x = build([channels[0] if channels[0] != "M" else 5, 6], 0.5, seed, torch.float64)
    model.alpha = alpha
    n, body = next(iter(model.narrow_layers.values())), model.network.body
    z = body[0](x)
    reduce, expand = next(iter(model.reduce.values())), next(iter(model.expand.values()))
    narrow = F.relu(n(F.conv2d(z, reduce.weight[:, :, None, None])))
    blend = alpha * body[2](body[1](z)) + (1 - alpha) * F.conv2d(narrow, expand.weight[:, :, None, None])
    seen = {}
    conv = body[3]
    hook = conv._conv_forward
    conv._conv_forward = lambda x, *rest: (seen.update(x=x), hook(x, *rest))[1]
    model.composed = False
    model(x)
    torch.testing.assert_close(seen["x"], blend, rtol=1e-9, atol=1e-9)


def test_alpha_one_is_the_pretrained_network_and_leaves_it_unchanged():
    network = vgg16(0.125)
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(4, 3, 32, 32)
    model = ParallelModel(network, example_input=x).eval()
    assert torch.equal(model(x), network.eval()(x))
    model.alpha = 0.5
    model.train()(x).sum().backward()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_fold_of_a_trained_vgg16_has_the_reports_size():
    x = torch.randn(2, 3, 32, 32)
    model = ParallelModel(vgg16(), example_input=x)
    assert (parameters(model.network), multiply_adds(model.network, x[:1])) == (14_728_266, 313_201_664)
    model.alpha = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([1, 2])).backward()
        optimizer.step()
    small, certificate = fold(model.eval(), torch.randn(3, 3, 32, 32))
    assert (parameters(small), multiply_adds(small, x[:1])) == (1_744_764, 37_409_504)
    assert certificate.exact and certificate.images == 3


def test_certificate_notices_a_wrong_fold():
    """A bias behind E is the known way to break the identity: it meets the zero padding."""
    model, x = build([6, 8, "M", 6], 0.5, 0, torch.float64)
    model.alpha = 0.0
    _, certificate = fold(model)
    assert certificate.exact
    expand = next(iter(model.expand.values()))
    expand.register_forward_hook(lambda m, args, out: out + 0.5)
    with pytest.raises(UsageError, match="the folded Flat differs from the model"):
        fold(model, x)
    _, certificate = fold(model, x, force=True)
    assert not certificate.exact and max(d for _, d, _ in certificate.layers) > 1e-3


def test_fold_above_alpha_zero_is_refused_or_says_how_far_off():
    model, _ = build([6, 8], 0.5, 0, torch.float64)
    model.alpha = 0.5
    with pytest.raises(UsageError, match=r"alpha is 0\.5.*force=True"):
        fold(model)
    _, certificate = fold(model, force=True)
    assert not certificate.exact and certificate.alpha == 0.5


def test_frozen_wide_weights_get_no_gradient_and_branches_do():
    x = torch.randn(4, 3, 32, 32)
    model = ParallelModel(vgg16(0.125), example_input=x)
    model.alpha, model.train_wide = 0.5, False
    model(x).sum().backward()
    assert all(p.grad is None for p in model.network.parameters())
    assert all(p.grad is not None for p in (*model.reduce.parameters(), *model.expand.parameters()))


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_bfloat16_autocast_computes_about_the_same(alpha):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    model = ParallelModel(vgg16(0.125), example_input=x)
    model.alpha = alpha
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x).float()
        logits.square().sum().backward()
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_alpha_can_be_set_a_mixer_at_a_time():
    model = ParallelModel(vgg16(0.125), example_input=torch.zeros(1, 3, 32, 32))
    model.alpha = {"classifier": 0.25}
    assert model.alpha[-1] == 0.25 and set(model.alpha[:-1]) == {1.0}
    model.alpha = [0.5] * 13
    assert model.alpha == 0.5


def test_deepcopy_computes_the_same():
    model, x = build([6, 8], 0.5, 0, torch.float64)
    model.alpha = 0.3
    assert torch.equal(copy.deepcopy(model)(x), model(x))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


IMAGE = torch.zeros(1, 3, 32, 32)
BAD = {
    "keep_ratio 0": (lambda: ParallelModel(vgg16(0.125), 0, IMAGE), r"keep_ratio is 0"),
    "keep_ratio above 1": (lambda: ParallelModel(vgg16(0.125), 1.5, IMAGE), r"\(0, 1\]"),
    "keep_ratio nan": (lambda: ParallelModel(vgg16(0.125), float("nan"), IMAGE), r"\(0, 1\]"),
    "keep_ratio text": (lambda: ParallelModel(vgg16(0.125), "0.5", IMAGE), r"\(0, 1\]"),
    "no channel left": (
        lambda: ParallelModel(vgg16(0.125), 0.1, IMAGE),
        r"leaves none of the 8 channels at 'features\.\d+'",
    ),
    "no example": (lambda: ParallelModel(vgg16(0.125), 0.5), r"example_input is missing"),
    "wrong example": (
        lambda: ParallelModel(vgg16(0.125), 0.5, torch.zeros(1, 1, 32, 32)),
        r"example_input \(1, 1, 32, 32\)",
    ),
    "wrapped twice": (
        lambda: ParallelModel(ParallelModel(vgg16(0.125), 0.5, IMAGE), 0.5, IMAGE),
        r"ParallelModel already",
    ),
    "one mixer": (lambda: ParallelModel(nn.Conv2d(3, 4, 3), 0.5, IMAGE), r"nothing to narrow"),
    "control flow": (lambda: ParallelModel(Branching(), 0.5, IMAGE), r"cannot be traced"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    make, message = BAD[name]
    with pytest.raises(UsageError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.5", None, True, [0.5], {"nobody": 0.5}])
def test_bad_alpha_is_refused_and_changes_nothing(alpha):
    model = ParallelModel(vgg16(0.125), example_input=IMAGE)
    with pytest.raises(UsageError, match="alpha"):
        model.alpha = alpha
    assert model.alpha == 1.0


def test_activations_in_place_are_restored_and_do_not_disturb_the_certificate():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.ReLU(True), nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model = ParallelModel(network.double(), 0.5, x)
    model.alpha = 0.5
    model(x).sum().backward()  # in place, this would fail
    model.alpha = 0.0
    small, certificate = fold(model)
    assert certificate.exact and small[1].inplace and network[1].inplace
