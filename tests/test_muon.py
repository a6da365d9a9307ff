"""Muon: what its steps are, and that all else goes on as with SGD."""

import pytest
import torch
from torch import nn

from alphaprune.muon import SIZE, Muon, mixes_channels, orthogonal


@pytest.mark.parametrize("seed", range(6))
def test_the_singular_vectors_stay_and_the_values_become_alike(seed):
    torch.manual_seed(seed)
    rows, columns = torch.randint(1, 90, (2,)).tolist()
    k = min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0] for n in (rows, columns))
    values = torch.logspace(0, -1.5, k, dtype=torch.float64)
    matrix = (u * values @ v.T * 10.0 ** torch.randint(-4, 5, ())).float()
    turned = u.T @ orthogonal(matrix).double() @ v  # diagonal where the vectors are the same
    assert turned.diagonal().min() > 0.3 and turned.diagonal().max() < 1.25
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-3
    assert turned.diagonal()[0] > 0.65


def test_nothing_becomes_of_nothing():
    assert torch.equal(orthogonal(torch.zeros(4, 7)), torch.zeros(4, 7))
    assert orthogonal(torch.full((4, 7), 1e-15)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (16, 16)])
def test_a_matrix_goes_where_torchs_own_takes_it(shape):
    """torch's is in bfloat16, which is exact to half a percent of each of some twenty products."""
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"momentum": 0.9, "weight_decay": 0.01}
    first = Muon([ours], lr=0.02, **options)
    # 0.2 there is 0.05 here; the decay goes with the rate, of which theirs is a quarter.
    second = torch.optim.Muon(
        [theirs], lr=0.005, adjust_lr_fn="match_rms_adamw", momentum=0.9, weight_decay=0.04
    )
    for g in gradients:
        ours.grad, theirs.grad = g.clone(), g.clone()
        first.step(), second.step()
    moved, expected = (p.detach() - start for p in (ours, theirs))
    assert (moved - expected).norm() < 0.03 * expected.norm()


def test_what_mixes_no_channels_takes_steps_of_sgd():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizers = [Muon(nets[0].parameters(), **options), torch.optim.SGD(nets[1].parameters(), **options)]
    for step in range(5):
        x = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(step))
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert not mixes_channels(a) and torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_step_of_a_filter_has_one_size_whatever_its_gradient(layout):
    torch.manual_seed(0)
    gradient = torch.randn(12, 5, 3, 3)
    found = []
    for scale in (1.0, 1e-3):
        p = nn.Parameter(torch.zeros(12, 5, 3, 3).to(memory_format=layout))
        optimizer = Muon([p], lr=0.1)
        p.grad = (scale * gradient).to(memory_format=layout)
        optimizer.step()
        found.append(p.detach().contiguous())
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6)
    flat = found[0].flatten(1)
    sizes = torch.linalg.svdvals(flat) / (0.1 * SIZE * 45**0.5)
    assert sizes.min() > 0.65 and sizes.max() < 1.25
    assert (flat * gradient.flatten(1)).sum() < 0  # downhill


def test_what_has_no_gradient_stays():
    p = nn.Parameter(torch.ones(3, 3))
    Muon([p], lr=1.0, weight_decay=0.1).step()
    assert torch.equal(p, torch.ones(3, 3))
