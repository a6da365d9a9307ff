"""Networks put together at random from every rule: the lockstep is the network, and the fold is the lockstep."""

import ast
import copy
import re

import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fold import scramble
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from alphaprune import ParallelModel, UsageError, fold, plan, save_bundle
from alphaprune.measure import multiply_adds, parameters
from alphaprune.trace import MIXING_LAYERS


class Residual(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv2d(c, c, 3, padding=1, groups=groups, bias=False),
            nn.BatchNorm2d(c),
            nn.Conv2d(c, c, 1),
        )

    def forward(self, x):
        out = self.b(F.relu(self.norm(self.a(x)), inplace=True))
        out += x
        return out


class Squeeze(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.down, self.up = nn.Conv2d(c, max(c // 2, 3), 1), nn.Conv2d(max(c // 2, 3), c, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Dense(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(c), nn.Conv2d(c, 6, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, self.conv(self.norm(x).relu())], 1)


class Depthwise(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv, self.norm, self.act = (
            nn.Conv2d(c, c, 3, padding=1, groups=c),
            nn.BatchNorm2d(c),
            nn.PReLU(c),
        )

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Gate(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, 2 * c, 1)

    def forward(self, x):
        a, b = self.conv(x).chunk(2, dim=1)
        return a * b.sigmoid()


class Shuffle(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.left, self.right = nn.Conv2d(c, 6, 1), nn.Conv2d(c, 6, 3, padding=1)

    def forward(self, x):
        x = torch.cat((self.left(x), self.right(x)), dim=1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


class LastNorm(nn.Module):
    """ConvNeXt style: channels last, LayerNorm, linear layers, a scale for each channel."""

    def __init__(self, c):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.scale = nn.Parameter(torch.rand(c, 1, 1))

    def forward(self, x):
        y = self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)
        return x + self.scale * y


class UpAndDown(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.down = nn.Conv2d(c, c + 2, 2, stride=2)
        self.up = nn.ConvTranspose2d(c + 2, c, 2, stride=2)

    def forward(self, x):
        return F.interpolate(self.up(self.down(x)), size=x.shape[-2:], mode="nearest") - x


class Twice(nn.Module):
    """One layer used twice."""

    def __init__(self, c):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(c)

    def forward(self, x):
        for _ in range(2):
            x = torch.tanh(self.norm(self.conv(x)))
        return x


class Grouped(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a = nn.Conv2d(c, 12, 1)
        self.b = nn.Conv2d(12, 18, 3, padding=1, groups=3)
        self.norm = nn.GroupNorm(3, 18)

    def forward(self, x):
        return self.norm(self.b(self.a(x).clamp(-1, 2)))


class Functional(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, c, 3, 3)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.leaky_relu(F.conv2d(x, self.weight, self.bias, padding=1), 0.1)


class NormFunctions(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.a, self.b = nn.Conv2d(c, 12, 1), nn.Conv2d(12, c, 1)
        self.bn, self.gn, self.ln = nn.BatchNorm2d(12), nn.GroupNorm(3, 12), nn.LayerNorm(c)

    def forward(self, x):
        bn, gn, ln = self.bn, self.gn, self.ln
        x = F.batch_norm(
            self.a(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, training=self.training
        )
        x = self.b(F.group_norm(x, gn.num_groups, gn.weight, bias=gn.bias)).permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], ln.weight, ln.bias).permute(0, 3, 1, 2)


PARTS = {
    "conv": (lambda c, n: nn.Conv2d(c, n, 3, padding=1), None),
    "residual": (lambda c, n: Residual(c, 1), 0),
    "grouped residual": (lambda c, n: Residual(c, 2 if c % 2 == 0 else 1), 0),
    "squeeze": (lambda c, n: Squeeze(c), 0),
    "dense": (lambda c, n: Dense(c), 6),
    "depthwise": (lambda c, n: Depthwise(c), 0),
    "gate": (lambda c, n: Gate(c), 0),
    "shuffle": (lambda c, n: Shuffle(c), 12),
    "last norm": (lambda c, n: LastNorm(c), 0),
    "up and down": (lambda c, n: UpAndDown(c), 0),
    "twice": (lambda c, n: Twice(c), 0),
    "grouped": (lambda c, n: Grouped(c), 18),
    "functional": (lambda c, n: Functional(c), 8),
    "norm functions": (lambda c, n: NormFunctions(c), 0),
}
OUT = {"conv": lambda c, n: n, "dense": lambda c, n: c + 6, "shuffle": lambda c, n: 12, "grouped": lambda c, n: 18,
       "functional": lambda c, n: 8}  # fmt: skip


class Random(nn.Module):
    def __init__(self, parts, widths, head):
        super().__init__()
        c, layers = 2, []
        for part, n in [("conv", widths[0]), *zip(parts, widths[1:], strict=True)]:
            layers.append(PARTS[part][0](c, n))
            c = OUT.get(part, lambda c, n: c)(c, n)
        self.body, self.head = nn.Sequential(*layers), head
        self.last = nn.Conv2d(c, c, 1) if head == "view" else nn.Identity()
        self.classifier = (
            nn.Linear({"flatten": 16 * c, "view": 64 * c}.get(head, c), 5)
            if head != "maps"
            else nn.Identity()
        )

    def forward(self, x):
        x = self.body(x)
        if self.head == "maps":
            return {"maps": x}
        if self.head == "view":  # of whatever memory order the convolution gives
            x = self.last(x.contiguous())
            return self.classifier(x.view(x.size(0), -1))
        if self.head == "flatten":
            return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 4), 1))
        return self.classifier(x.amax((2, 3)))


# The first two arguments of `Random`, and its last.
PARTS_AND_WIDTHS = st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5).flatmap(
    lambda p: st.tuples(st.just(p), st.lists(st.integers(4, 14), min_size=len(p) + 1, max_size=len(p) + 1))
)
HEADS = st.sampled_from(["mean", "flatten", "maps", "view"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    PARTS_AND_WIDTHS,
    HEADS,
    st.sampled_from([0.34375, 0.5, 0.8]),
    st.sampled_from(["uniform", "one layer else", "one excluded"]),
    st.integers(0, 2**31),
)
def test_random_networks_fold_exactly(parts_and_widths, head, keep_ratio, choice, seed):
    torch.manual_seed(seed)
    network = Random(*parts_and_widths, head).double()
    layers = [name for name, m in network.named_modules() if isinstance(m, MIXING_LAYERS)]
    layer = layers[seed % len(layers)]
    options = {"exclude": [layer]} if choice == "one excluded" else {}
    if choice == "one layer else":
        keep_ratio = {"*": keep_ratio, layer: 0.65}
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    try:
        try:
            model = ParallelModel(network, keep_ratio, x, **options)
        except UsageError as e:  # blocks of different make across a concatenation: the remedy it names works
            named = re.search(r"exclude=(\[.*\])$", str(e))
            if named is None:
                raise
            exclude = [*options.get("exclude", []), *ast.literal_eval(named[1])]
            model = ParallelModel(network, keep_ratio, x, exclude=exclude)
    except UsageError as e:  # all channels reach the output, or are excluded
        assert "nothing to narrow" in str(e), e
        return
    scramble(model, seed)
    model.alpha = 0.0
    try:
        small, certificate = fold(model)
    except (
        UsageError
    ) as e:  # torch calls one channel contiguous in either order, and no view() of what follows is possible
        assert (
            "view size" in str(e)
            and min(model.widths.positions(m.ids_in).numel() for m in model.mixers if m.reads) == 1
        ), e
        return
    assert certificate.exact and type(small) is Random, certificate
    first = lambda y: y["maps"] if head == "maps" else y  # noqa: E731
    scale = first(model.eval()(x)).abs().max()
    assert (first(small(x)) - first(model(x))).abs().max() <= 1e-10 * scale
    model.alpha = 1.0
    assert (first(model(x)) - first(model.network(x))).abs().max() <= 1e-10 * first(model(x)).abs().max()
    model.alpha = 0.4  # both programs train
    values = first(model.train()(x))
    values.sum().backward()
    assert all(p.grad is not None for p in model.reduce.parameters())
    assert all(m.weight.grad is not None for m in model.expand.values())
    assert torch.isfinite(values).all()
    assert copy.deepcopy(small)(x) is not None


def parallel(network, channels=2, **options):
    return ParallelModel(
        network.double().eval(), example_input=torch.randn(2, channels, 8, 8).double(), **options
    )


@pytest.mark.parametrize("part", PARTS)
def test_every_part_alone_is_narrowed(part):
    torch.manual_seed(0)
    model = parallel(Random([part, "conv"], [12, 12, 8], "mean"), keep_ratio=0.5)
    scramble(model, 0)
    model.alpha = 0.0
    small, certificate = fold(model)
    assert certificate.exact
    narrower = [m.name for m in model.mixers if m.key in model.reduce]
    assert len(narrower) == len(model.mixers) - 1, narrower  # all but the classifier
    assert sum(p.numel() for p in small.parameters()) < 0.6 * sum(
        p.numel() for p in model.network.parameters()
    )


class TwoInputs(nn.Module):
    """Two inputs, two outputs, a global shortcut, dropout as a function that depends on the mode."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(2, 8, 3, padding=1) for _ in range(4))
        self.out, self.head = nn.Conv2d(16, 2, 1), nn.Linear(8, 3)

    def forward(self, x, y):
        a, b = F.relu(self.a(x)), F.relu(self.b(y))
        a = F.dropout(a * b, 0.5, self.training)
        maps = self.out(torch.cat([a, self.c(x)], 1)) + x
        return maps, self.head(self.d(y).mean(dim=[2, 3]) + a.mean([2, 3]))


def test_several_inputs_and_outputs():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 8, 8).double(), torch.randn(3, 2, 8, 8).double()
    model = ParallelModel(TwoInputs().double(), 0.5, x)
    scramble(model, 0)
    model.alpha = 0.0
    small, certificate = fold(model, x)
    assert certificate.exact and len(certificate.layers) == 4
    assert (small.a.out_channels, small.c.out_channels, small.d.out_channels, small.out.in_channels) == (
        4,
        4,
        4,
        8,
    )
    for a, b in zip(small(*x), model.eval()(*x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    torch.manual_seed(1)
    first = model.train()(*x)[0]
    assert not torch.equal(first, model(*x)[0])  # dropout drops in training mode
    assert torch.equal(model.eval()(*x)[0], model(*x)[0])


class Overwritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.a(x)
        y = self.relu(x)  # overwrites x, which the sum reads
        return self.b(x + y)


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.aux = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return (self.b(x), self.aux(x)) if self.training else self.b(x)


class OtherWay(nn.Module):
    """The same layers in the same order, but what they read."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return self.c(b) + (a if self.training else b)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Overwritten(), "Overwritten overwrites 'a' at 'relu' and goes on using it"),
        (Auxiliary(), "computes something else in training mode, with 'aux'"),
        (OtherWay(), "OtherWay computes something else in training mode;"),
    ],
)
def test_networks_whose_trace_is_another_function_are_refused(network, message):
    with pytest.raises(UsageError, match=message):
        parallel(network, keep_ratio=0.5)


class Across(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1)
        self.c, self.d = nn.Conv2d(10, 10, 3, groups=2), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        a = self.a(x)
        return self.d(self.c(torch.cat([a, self.b(a)], 1)))


def test_groups_across_a_concatenation_are_refused_and_the_remedy_works():
    with pytest.raises(
        UsageError, match=r"groups of 'c' would keep different numbers of channels; exclude=\['a', 'b'\]"
    ):
        parallel(Across(), keep_ratio=0.34375)
    model = parallel(Across(), keep_ratio=0.34375, exclude=["a", "b"])
    model.alpha = 0.0
    assert fold(model)[1].exact


def test_channels_that_stay_pass_through_a_concatenation_unchanged():
    class Join(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    model = parallel(Join(), keep_ratio=0.5, exclude=["a"])
    expand = model.expand["c"].weight
    assert (
        torch.equal(expand[:4], torch.eye(4, 7).double())
        and not expand[4:, :4].any()
        and expand[4:, 4:].all()
    )


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.b(self.a(x) * torch.tensor([1.0, 2, 3, 4]).view(-1, 1, 1))


def test_numbers_for_each_channel_made_in_forward_are_refused():
    with pytest.raises(UsageError, match=r"meets .*exclude=\['a'\]"):
        parallel(Constant(), keep_ratio=0.5)


def test_a_network_that_cannot_be_copied_is_named():
    network = nn.Sequential(nn.Conv2d(2, 4, 1), nn.utils.weight_norm(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 2, 1))
    with pytest.raises(UsageError, match="Sequential cannot be copied"):
        parallel(network, keep_ratio=0.5)


def network_of(forward, **layers):
    """A network of these layers; forward(self, x, ...) is a function."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

    Small.forward = forward
    return Small()


def conv(inputs, outputs, **options):
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def pyramid(self, x):
    x = self.a(x)
    return self.b(torch.cat([x, F.max_pool2d(x, 3, 1, 1), x], 1))


def focus(self, x):
    x = F.pixel_unshuffle(self.a(x), 2)
    return self.b(F.relu(x))


def gated_parts(self, x):
    return self.b(torch.cat(self.a(x).chunk(2, 1), axis=1))


def with_default(self, x, scale=2.0, mask=None):
    x = self.a(x) * scale
    return self.b(x if mask is None else x * mask)


def by_keyword(self, x):
    return self.b(input=F.conv2d(input=self.a(x), weight=self.w))


def log_probabilities(self, x):
    return F.log_softmax(self.b(self.a(x)).mean((2, 3)), dim=1)


def sizes(self, x):
    x = self.b(self.a(x))
    return x, x.shape[0], None


EVERYDAY = {
    "the same map several times": (pyramid, {"a": conv(2, 8), "b": conv(24, 4)}),
    "space to depth": (focus, {"a": conv(2, 8), "b": conv(32, 4)}),
    "all parts of a chunk": (gated_parts, {"a": conv(2, 8), "b": conv(8, 4)}),
    "defaults": (with_default, {"a": conv(2, 8), "b": conv(8, 4)}),
    "by keyword": (by_keyword, {"a": conv(2, 8), "b": conv(6, 4), "w": nn.Parameter(torch.randn(6, 8, 1, 1))}),
    "softmax at the end": (log_probabilities, {"a": conv(2, 8), "b": conv(8, 4)}),
    "numbers in the output": (sizes, {"a": conv(2, 8), "b": conv(8, 4)}),
    "one slope for all": (lambda self, x: self.b(self.p(self.a(x))), {"a": conv(2, 8), "p": nn.PReLU(), "b": conv(8, 4)}),
    "frozen norm": (
        lambda self, x: self.b(self.n(self.a(x))),
        {"a": conv(2, 8), "n": torchvision.ops.FrozenBatchNorm2d(8), "b": conv(8, 4)},
    ),
    "a parameter of the network": (
        lambda self, x: self.b(self.a(x) * self.g[:, None, None]),
        {"a": conv(2, 8), "b": conv(8, 4), "g": nn.Parameter(torch.rand(8))},
    ),
    "behind a rearrangement": (
        lambda self, x: self.c(self.b(F.pixel_shuffle(self.a(x), 2))),
        {"a": conv(2, 8), "b": conv(2, 8), "c": conv(8, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EVERYDAY)
def test_everyday_networks(name):
    forward, layers = EVERYDAY[name]
    network = network_of(forward, **copy.deepcopy(layers)).double()
    x = torch.randn(2, 2, 8, 8).double()
    try:
        model = ParallelModel(network, 0.5, x)
    except UsageError as e:  # then what it says to exclude leads on
        names = re.search(r"exclude=(\[.*\])", str(e))
        model = ParallelModel(network, 0.5, x, exclude=ast.literal_eval(names[1]))
    scramble(model, 1)
    model.alpha = 0.0
    small, certificate = fold(model, x)
    assert certificate.exact
    p = plan(network, 0.5, x, exclude=["a"] if name == "behind a rearrangement" else (), latency=False)
    assert p.table["parameters"].sum() == parameters(network)
    assert p.table["parameters_folded"].sum() == parameters(small) < parameters(network)
    assert p.table["multiply_adds_folded"].sum() == multiply_adds(small, x[:1])
    model.alpha = 0.5
    sum(t.sum() for t in tree_flatten(model.train()(x))[0] if isinstance(t, torch.Tensor)).backward()
    assert all(p.grad is not None for p in (*model.reduce.parameters(), *model.expand.parameters()))


def test_planning_and_wrapping_leave_the_network_and_the_random_numbers_alone():
    network = nn.Sequential(conv(2, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4)).train()
    network[1].eval()
    network[0].requires_grad_(False)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    x = torch.randn(2, 2, 8, 8)
    state = torch.get_rng_state()
    plan(network, 0.5, x)
    assert torch.equal(torch.get_rng_state(), state)
    model = ParallelModel(network, 0.5, x)
    assert network.training and not network[1].training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert not any(p.requires_grad for p in model.network[0].parameters())
    assert all(p.requires_grad for p in model.narrow_layers.parameters())
    model.train_wide = False
    model.train_wide = True
    assert [p.requires_grad for p in model.network.parameters()] == [
        p.requires_grad for p in network.parameters()
    ]
    model.alpha = 0.0
    model.network[1].eval()
    fold(model.double())
    assert not model.network[1].training and model.training


def unused(self, x):
    x = self.a(x)
    self.c(x)
    return self.b(x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (unused, "what layer 'c' gives is not used"),
        (lambda self, x: self.b(self.a(x).clamp_(max=1.0)), None),
        (lambda self, *xs: self.b(self.a(xs[0])), r"takes any number of inputs; name them"),
        (
            lambda self, x: self.b((self.a(x) > 0).to(x.dtype)),
            r"'gt' \(gt\) is covered by no rule.*exclude=\['a'\]",
        ),
        (
            lambda self, x: self.b(self.a(x)[:, [1, 0, 3, 2, 5, 4, 7, 6]]),
            r"picks numbers by a list or a tensor.*exclude=\['a'\]",
        ),
        (lambda self, x: self.b(self.a(x)) / self.a.in_channels**0.5 * self.b.in_channels, None),
    ],
)
def test_what_is_said_of_unusual_networks(forward, message):
    network = network_of(forward, a=conv(2, 8), b=conv(8, 4), c=conv(8, 4))
    if message is None:
        ParallelModel(network, 0.5, torch.randn(2, 2, 8, 8))
    else:
        with pytest.raises(UsageError, match=message):
            ParallelModel(network, 0.5, torch.randn(2, 2, 8, 8))


def test_a_fold_that_is_another_function_is_refused():
    network = network_of(lambda self, x: self.b(self.a(x)) * self.b.in_channels, a=conv(2, 8), b=conv(8, 4))
    model = ParallelModel(network, 0.5, torch.randn(2, 2, 8, 8))
    model.alpha = 0.0
    with pytest.raises(UsageError, match="the folded Small differs from the model"):
        fold(model)


def test_a_group_norm_across_a_concatenation_is_refused_and_the_remedy_works():
    def forward(self, x):
        x = self.a(x)
        return self.c(self.n(torch.cat([x, self.b(x)], 1)))

    build = lambda: network_of(  # noqa: E731
        forward, a=conv(2, 6), b=conv(6, 10), c=conv(16, 4), n=nn.GroupNorm(4, 16)
    )
    with pytest.raises(UsageError, match=r"the 4 groups of 'n' would keep.*exclude=\['a', 'b'\]"):
        parallel(build(), keep_ratio=0.34)
    wide = network_of(
        lambda self, x: self.d(forward(self, x)),
        a=conv(2, 6),
        b=conv(6, 10),
        c=conv(16, 8),
        d=conv(8, 4),
        n=nn.GroupNorm(4, 16),
    )
    model = parallel(wide, keep_ratio=0.34, exclude=["a", "b"])
    model.alpha = 0.0
    assert fold(model)[1].exact


@pytest.mark.parametrize("name", ["update", "keys", "values", "pop", "items", "weight", "copy"])
def test_layers_may_be_called_like_methods(name):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(2, 8, 3)
            setattr(self, name, nn.Conv2d(8, 8, 3))
            self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 3, 3)

        def forward(self, x):
            return self.last(self.norm(getattr(self, name)(self.first(x))))

    model = parallel(Named(), keep_ratio={name: 0.5, "first": 0.5})
    model.alpha = 0.0
    small, certificate = fold(model)
    assert certificate.exact and getattr(small, name).out_channels == 4


def test_one_layer_of_a_shuffled_network_can_be_left_and_its_blocks_stay_even():
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5().double().eval()
    x = torch.randn(2, 3, 32, 32).double()
    for options in ({"exclude": ["stage3.1.branch2.0"]}, {"keep_ratio": {"*": 0.34375, "stage2.0": 0.5}}):
        model = ParallelModel(network, example_input=x, **options)
        model.alpha = 0.0
        small, certificate = fold(model)
        assert certificate.exact
    assert small.stage2[0].branch1[2].out_channels == small.stage2[3].branch2[5].out_channels == 12
    assert small.stage3[0].branch1[2].out_channels == 16


def test_a_depthwise_convolution_can_be_named():
    network = torchvision.models.mobilenet_v2(width_mult=0.35)
    x = torch.randn(1, 3, 32, 32)
    for options in (
        {"exclude": ["features.2.conv.1.0"]},
        {"keep_ratio": {"*": 0.5, "features.2.conv.1.0": 1}},
    ):
        table = plan(network, example_input=x, latency=False, **options).table.set_index("layer")
        kept = table["out_folded"] == table["out"]
        assert kept["features.2.conv.1.0"] and kept["features.2.conv.0.0"] and not kept["features.3.conv.0.0"]


class Multiplied(nn.Module):
    """A depthwise convolution with two filters a channel, and one whose weight is computed."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 16, 3, groups=8)
        self.c, self.d, self.e = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu())
        w = self.d.weight
        return self.e(F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True), self.d.bias)).mean((2, 3))


def test_the_plan_says_why_groups_of_one_stay_and_counts_what_has_a_computed_weight():
    network, x = Multiplied().eval(), torch.randn(2, 2, 8, 8)
    planned = plan(network, 0.5, x, exclude=["c"], latency=False)
    why = planned.table.set_index("layer")["why_wide"]
    assert why["a"] == "each of its groups has one channel, and keeps it" and "computed" in why["conv2d"]
    assert planned.table["multiply_adds"].sum() == multiply_adds(network, x[:1])
    model = ParallelModel(network, 0.5, x, exclude=["c"])
    model.alpha = 0.0
    assert planned.table["multiply_adds_folded"].sum() == multiply_adds(fold(model)[0], x[:1])


def nan_weights(model):
    model.alpha = 0.0
    with torch.no_grad():
        next(iter(model.reduce.values())).weight.fill_(float("nan"))
    return model


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda net, x: ParallelModel(net, {}, x), "keep_ratio names no layer"),
        (lambda net, x: ParallelModel(net, 0.5, x, exclude=[3]), "exclude holds 3"),
        (lambda net, x: ParallelModel(None, 0.5, x), "network, a NoneType, is no torch.nn.Module"),
        (lambda net, x: ParallelModel(torch.jit.trace(net, x), 0.5, x), "is compiled by torch.jit"),
        (lambda net, x: ParallelModel(nn.Sequential(nn.LazyConv2d(3, 3)), 0.5, x), "'0.weight' has no shape yet"),
        (lambda net, x: ParallelModel(nn.Sequential(ParallelModel(net, 0.5, x)), 0.5, x), "holds one at '0' already"),
        (lambda net, x: ParallelModel(nn.DataParallel(net), 0.5, x), "wrapped in a DataParallel; pass network.module"),
        (lambda net, x: ParallelModel(copy.deepcopy(net).to("meta"), 0.5, x), "'0.weight' is on the meta device"),
        (lambda net, x: ParallelModel(net, 0.5, (x, x)), "holds 2 inputs"),
        (lambda net, x: ParallelModel(net, 0.5, x[:0]), "example_input is empty"),
        (lambda net, x: ParallelModel(net, x, 0.5), "keep_ratio is a tensor; the order is network, keep_ratio"),
        (lambda net, x: ParallelModel(net, 0.5, x * float("nan")), "example_input holds NaN"),
        (lambda net, x: ParallelModel(net, {3: 0.5}, x), "keep_ratio names 3"),
        (lambda net, x: ParallelModel(net, 0.5, x, exclude=5), "exclude is 5; give a list"),
        (lambda net, x: ParallelModel(net, 0.5, x, init="select", images=iter([x])), "images is a list_iterator"),
        (lambda net, x: ParallelModel(net, 0.5, x, init="select", images=x[:, :1]), r"give some like example_input, \(N, 2, 8, 8\)"),
        (lambda net, x: ParallelModel(net, 0.5, x, init="least_squares", images=x[:0]), "images are"),
        (lambda net, x: ParallelModel(net, 0.5, x, init="least_squares", images=x / 0), "images hold NaN"),
        (lambda net, x: setattr(ParallelModel(net, 0.5, x), "alpha", "0.5"), "alpha is the text '0.5'"),
        (lambda net, x: fold(nan_weights(ParallelModel(net, 0.5, x)), x), "gives NaN or infinite numbers"),
        (lambda net, x: save_bundle(net, x, "bundle"), "folder a Tensor"),
        (lambda net, x: save_bundle(net, "bundle", x, "exact"), "certificate is a str"),
        (lambda net, x: fold(net), "model is a Sequential; fold takes a ParallelModel"),
        (lambda net, x: fold(ParallelModel(net, 0.5, x), x[:, :1], force=True), r"images \(2, 1, 8, 8\) .* do not pass"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(wrong, message):
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    with pytest.raises(UsageError, match=message) as found:
        wrong(network, torch.randn(2, 2, 8, 8))
    assert "\n" not in str(found.value)
