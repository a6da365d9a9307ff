"""The optimised network computes the same, with fewer operations, and is used as the one before."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from torchvision.models import densenet121, mobilenet_v3_small, resnet18

from alphaprune import ParallelModel, UsageError, fold, optimise_for_inference
from alphaprune.measure import multiply_adds
from alphaprune.models import resnet20, vgg16
from alphaprune.one_kernel import ConvRelu, _knows

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(network: nn.Module, images: torch.Tensor = IMAGES) -> nn.Module:
    """With statistics and factors in its BatchNorms that are not 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for m in network.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
        network.train()(images)
    return network.eval()


def batchnorms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@pytest.mark.parametrize("make", [lambda: vgg16(0.25), resnet20, resnet18, mobilenet_v3_small])
def test_it_computes_the_same_without_batchnorm(make):
    network = trained(make())
    before = copy.deepcopy(network.state_dict())
    fast = optimise_for_inference(network, IMAGES)
    others = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(
        fast(others), network(others), rtol=0, atol=1e-4 * float(network(others).abs().max())
    )
    assert batchnorms(network) > 0 and batchnorms(fast) == 0 and not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_folded_network_is_optimised():
    model = ParallelModel(trained(vgg16(0.25)), 0.5, IMAGES)
    model.alpha = 0.0
    small, _ = fold(model)
    fast = optimise_for_inference(small, IMAGES)
    assert fast.get_submodule("features.0").out_channels == small.features[0].out_channels
    torch.testing.assert_close(fast(IMAGES), small(IMAGES), rtol=1e-3, atol=1e-4)


def test_batchnorm_stays_where_something_stands_between():
    network = trained(densenet121(), torch.randn(2, 3, 64, 64))
    fast = optimise_for_inference(network, torch.randn(2, 3, 64, 64))
    assert 0 < batchnorms(fast) < batchnorms(network)


def test_in_bfloat16_it_takes_and_gives_float32():
    network = trained(resnet20())
    fast = optimise_for_inference(network, IMAGES, torch.bfloat16)
    found, expected = fast(IMAGES), network(IMAGES)
    assert found.dtype == torch.float32 and fast.conv.weight.dtype == torch.bfloat16
    assert 0 < float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())


class Twice(nn.Module):
    """One convolution in two places, with a BatchNorm of its own behind each."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.first(self.conv(x))
        return self.second(self.conv(x)), x.argmax(1)


def test_a_layer_used_twice_and_whole_numbers():
    network = trained(Twice())
    for dtype in (None, torch.bfloat16):
        fast = optimise_for_inference(network, IMAGES, dtype)
        assert batchnorms(fast) == 0
        (found, places), (expected, same) = fast(IMAGES), network(IMAGES)
        assert float((found - expected).abs().max()) < (0.1 if dtype else 1e-5) * float(expected.abs().max())
        assert places.dtype == same.dtype == torch.int64 and (dtype or torch.equal(places, same))


class Sensitive(nn.Module):
    """What a network may do that fewer bits destroy: take the difference of two nearly equal numbers."""

    def forward(self, x):
        return (self.conv(x) + 1e4) - 1e4

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (
            Sensitive(),
            {"dtype": torch.bfloat16},
            "does not compute the same once it is optimised in bfloat16; leave dtype out",
        ),
        (vgg16(0.125), {"dtype": torch.int8}, "dtype is torch.int8; use one of torch.float64"),
        (vgg16(0.125), {"example_input": torch.zeros(1, 4, 32, 32)}, "does not pass through the network"),
        ("network", {}, "is no torch.nn.Module"),
    ],
)
def test_what_cannot_be_optimised_is_refused(network, options, message):
    with pytest.raises(UsageError, match=message):
        optimise_for_inference(network, **({"example_input": IMAGES} | options))


class Residual(nn.Module):
    """A block as in a ResNet; `form` says how the sum is written, and `after` what else is done with its parts."""

    def __init__(self, form, after=None):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(6 if i else 3, 6, 3, padding=1) for i in range(3))
        self.relu, self.form, self.after = nn.ReLU(inplace=True), form, after

    def forward(self, x):
        y = self.relu(self.a(x))
        z = self.form(self.c(nn.functional.relu(self.b(y))), y)
        out = self.relu(z)
        return out if self.after is None else self.after(out, z, y)


def operations(network):
    """The names of what is left beside layers of convolution, pooling and the like."""
    targets = (
        type(network.get_submodule(n.target)).__name__
        if n.op == "call_module"
        else getattr(n.target, "__name__", n.target)
        for n in network.graph.nodes
    )
    return [t for t in targets if any(word in t.lower() for word in ("relu", "add")) and t != "ConvRelu"]


@pytest.mark.parametrize("make", [lambda: vgg16(0.25), resnet20, resnet18])
def test_relu_and_residuals_go_into_the_convolution_before_them(make):
    network = trained(make())
    fast = optimise_for_inference(network, IMAGES)
    assert operations(fast) == []
    assert set(fast.state_dict()) <= set(network.state_dict()) | {
        k.replace("weight", "bias") for k in network.state_dict()
    }


@pytest.mark.parametrize(
    ("form", "after", "left"),
    [
        (lambda z, y: z + y, None, []),
        (lambda z, y: y + z, None, []),
        (lambda z, y: torch.add(z, y), None, []),
        (lambda z, y: z.add_(y), None, []),
        (lambda z, y: torch.add(z, y, alpha=2.0), None, ["add", "ReLU"]),  # the kernel has no factor
        (
            lambda z, y: z + y.mean((2, 3), keepdim=True),
            None,
            [],
        ),  # nor does it broadcast: one after the other
        (lambda z, y: z + 1.0, None, ["add", "ReLU"]),
        (lambda z, y: z + z, None, ["add", "ReLU"]),
        (lambda z, y: z + y, lambda out, z, y: out * y.sum(), []),  # y is read again
        (lambda z, y: z + y, lambda out, z, y: out * (z * 1.0), ["add", "ReLU"]),  # so is the sum
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_goes_into_one_kernel_is_the_same_function(form, after, left, dtype):
    torch.manual_seed(0)
    network = Residual(form, after).eval()
    fast = optimise_for_inference(network, IMAGES, dtype)
    assert operations(fast) == left
    x = torch.randn(3, 3, 20, 24)
    found, expected = fast(x), network(x)
    assert float((found - expected).abs().max()) < (0.1 if dtype else 1e-5) * float(expected.abs().max())


def kernels(network, x):
    with torch.profiler.profile() as seen, torch.no_grad():
        network(x)
    return sum(e.count for e in seen.key_averages() if e.key == "mkldnn::_convolution_pointwise")


@pytest.mark.skipif(not _knows(torch.float32), reason="no oneDNN")
def test_the_kernels_run_and_are_counted():
    network = trained(resnet20())
    fast = optimise_for_inference(network, IMAGES)
    merged = sum(isinstance(m, ConvRelu) for m in fast.modules())
    assert kernels(fast, IMAGES) == merged == 19
    assert multiply_adds(fast, IMAGES[:1]) == multiply_adds(network, IMAGES[:1])


class Placed(nn.Module):
    """Adds what has the shape of one image: another than that of a larger batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.at = nn.Conv2d(3, 4, 3, padding=1), nn.Parameter(torch.randn(1, 4, 32, 32))

    def forward(self, x):
        return nn.functional.relu(self.conv(x) + self.at)


class Overwritten(nn.Module):
    """What the convolution has read is changed before the sum."""

    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        z = self.conv(y)
        return torch.relu(z + torch.relu_(y))


class Watched(nn.Module):
    """The weight is computed in a hook."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.spectral_norm(nn.Conv2d(3, 4, 3))

    def forward(self, x):
        return torch.relu(self.conv(x))


@pytest.mark.parametrize("make", [Placed, Overwritten, Watched])
def test_what_one_kernel_would_change_is_the_same_on_a_larger_batch(make):
    torch.manual_seed(0)
    network = make().eval()
    fast = optimise_for_inference(network, IMAGES[:1])
    torch.testing.assert_close(fast(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)


def test_gradients_of_images_exporters_and_an_empty_batch_see_the_same_network(tmp_path):
    network = trained(resnet20())
    fast = optimise_for_inference(network, IMAGES)
    gradients = []
    for n in (fast, network):
        x = IMAGES.clone().requires_grad_()
        n(x)[:, 3].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[1].abs().max()))
    expected = network(IMAGES)
    exported = torch.export.export(fast, (IMAGES,)).module()
    torch.testing.assert_close(exported(IMAGES), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.save(fast, tmp_path / "fast.pt")
    again = torch.load(tmp_path / "fast.pt", weights_only=False)
    assert torch.equal(again(IMAGES), fast(IMAGES))
    assert fast(IMAGES[:0]).shape == (0, 10)


def test_layers_of_one_and_three_dimensions_are_optimised():
    for conv, norm, x in (
        (nn.Conv3d, nn.BatchNorm3d, torch.randn(2, 3, 6, 6, 6)),
        (nn.Conv1d, nn.BatchNorm1d, torch.randn(2, 3, 20)),
    ):
        network = nn.Sequential(conv(3, 4, 3), norm(4), nn.ReLU(), conv(4, 4, 1)).eval()
        for dtype in (None, torch.bfloat16):
            fast = optimise_for_inference(network, x, dtype)
            assert batchnorms(fast) == 0
            found, expected = fast(x), network(x)
            assert float((found - expected).abs().max()) < (0.1 if dtype else 1e-5) * float(
                expected.abs().max()
            )


class Several(nn.Module):
    """What networks give beside one tensor."""

    def __init__(self, form):
        super().__init__()
        self.conv, self.form = nn.Conv2d(3, 4, 3, padding=1), form

    def forward(self, x):
        return self.form(self.conv(x))


@pytest.mark.parametrize(
    "form",
    [
        lambda y: (y, None),
        lambda y: y.chunk(2, 1),
        lambda y: {"parts": y.chunk(2, 1), "best": y.max(1), "size": y.shape[2], "none": None},
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_outputs_may_hold_tuples_numbers_and_nothing(form, dtype, tmp_path):
    torch.manual_seed(0)
    network = Several(form).eval().requires_grad_(False)
    fast = optimise_for_inference(network, IMAGES, dtype)
    (found, like), (expected, same) = tree_flatten(fast(IMAGES)), tree_flatten(network(IMAGES))
    assert like == same
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            assert a.dtype == b.dtype
            assert float((a - b).abs().max()) < (0.1 if dtype else 1e-5) * float(b.abs().max())
        else:
            assert type(a) is type(b)
    torch.save(fast, tmp_path / "fast.pt")
    again = torch.load(tmp_path / "fast.pt", weights_only=False)
    assert tree_flatten(again(IMAGES))[1] == same
