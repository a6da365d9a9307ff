"""BatchNorm of few channels is torch's, up to rounding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alphaprune import ParallelModel, few_channels
from alphaprune.models import vgg16


@pytest.fixture(autouse=True, scope="module")
def few_images_do():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_channels, "SIZE", 1)
        yield


def images(n, channels, side, dtype=torch.float64, requires_grad=True):
    x = 3 * torch.randn(n, channels, side, side, dtype=dtype) + torch.randn(channels, 1, 1, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)


def layers(channels, dtype=torch.float64, **given):
    layer = nn.BatchNorm2d(channels, dtype=dtype, **given)
    if layer.affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer, copy.deepcopy(layer)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 3), st.floats(0.01, 1.0), st.floats(1e-6, 1.0), st.integers(0, 999))
def test_it_is_torchs_in_outputs_gradients_and_statistics(channels, more, momentum, eps, seed):
    torch.manual_seed(seed)
    x = images(16 + more, channels, 32)
    torchs, ours = layers(channels, momentum=momentum, eps=eps)
    y, z = torchs(x), few_channels.batch_norm(ours, x)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, *torchs.parameters()), dy)
    found = torch.autograd.grad(z, (x, *ours.parameters()), dy)
    for a, b in zip((y, *expected, *torchs.buffers()), (z, *found, *ours.buffers()), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9 * float(a.detach().abs().max()))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_that_nobody_asks_for_is_not_there_and_the_rest_is():
    x = images(16, 5, 32, requires_grad=False)
    torchs, ours = layers(5)
    for layer, call in ((torchs, torchs), (ours, lambda x: few_channels.batch_norm(ours, x))):
        call(x).square().sum().backward()
        assert layer.weight.grad is not None
    torch.testing.assert_close(ours.weight.grad, torchs.weight.grad)
    assert x.grad is None


def test_a_gradient_of_its_gradient_is_torchs():
    torch.manual_seed(0)
    x = images(16, 5, 32)
    torchs, ours = layers(5)
    penalties = []
    for layer, y in ((torchs, torchs(x)), (ours, few_channels.batch_norm(ours, x))):
        dx = torch.autograd.grad(y.exp().sum(), x, create_graph=True)[0]
        penalties.append(torch.autograd.grad(dx.square().sum(), (x, *layer.parameters())))
    for a, b in zip(*penalties, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-8 * float(a.abs().max()))


class Doubling(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)
    return layer


def without_count(layer):
    layer.num_batches_tracked = None
    return layer


LEFT_TO_TORCH = {
    "channels that fill registers": lambda: (layers(24)[0], images(16, 24, 32)),
    "channels first": lambda: (layers(5)[0], images(16, 5, 32).detach().contiguous()),
    "in eval mode": lambda: (layers(5)[0].eval(), images(16, 5, 32)),
    "without weights": lambda: (layers(5, affine=False)[0], images(16, 5, 32)),
    "without statistics": lambda: (layers(5, track_running_stats=False)[0], images(16, 5, 32)),
    "statistics of all batches": lambda: (layers(5, momentum=None)[0], images(16, 5, 32)),
    "without bias": lambda: (nn.BatchNorm2d(5, bias=False, dtype=torch.float64), images(16, 5, 32)),
    "without a count of batches": lambda: (without_count(layers(5)[0]), images(16, 5, 32)),
    "a layer of its own kind": lambda: (Doubling(5, dtype=torch.float64), images(16, 5, 32)),
    "a forward() of its own": lambda: (doubled(layers(5)[0]), images(16, 5, 32)),
    "places that do not divide": lambda: (layers(5)[0], images(17, 5, 31)),
}


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_what_else_there_is_is_called_as_it_is(case):
    layer, x = LEFT_TO_TORCH[case]()
    twin = LEFT_TO_TORCH[case]()[0]  # a copy would call the forward() of the first
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(few_channels.batch_norm(layer, x), twin(x))
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), twin.buffers(), strict=True))


HOOKS = {
    "before": lambda layer, call: layer.register_forward_pre_hook(call),
    "behind": lambda layer, call: layer.register_forward_hook(call),
    "backward": lambda layer, call: layer.register_full_backward_hook(call),
    "of all modules": lambda layer, call: nn.modules.module.register_module_forward_hook(call),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_called(kind):
    (layer, _), seen = layers(5), []
    hook = HOOKS[kind](layer, lambda *_: seen.append(1))
    few_channels.batch_norm(layer, images(16, 5, 32)).sum().backward()
    hook.remove()
    assert seen == [1]


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_a_model_with_branches_trains_as_without_it(alpha, monkeypatch):
    torch.manual_seed(0)
    model = ParallelModel(vgg16(0.25).double(), 0.34375, torch.randn(2, 3, 32, 32).double()).double()
    model.alpha = alpha
    model.to(memory_format=torch.channels_last).train()
    twin, x = copy.deepcopy(model), images(16, 3, 32, requires_grad=False)
    used = []
    own = few_channels._BatchNorm.apply
    monkeypatch.setattr(few_channels._BatchNorm, "apply", lambda *a: used.append(1) or own(*a))
    model(x).square().sum().backward()
    assert used
    monkeypatch.setattr(few_channels, "SIZE", 1 << 62)
    twin(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if p.grad is not None or q.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, rtol=1e-7, atol=1e-9 * (1 + float(q.grad.abs().max())), msg=name
            )
