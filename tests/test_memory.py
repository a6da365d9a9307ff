"""Memory is watched in a process of its own; what narrows a network lowers it."""

import weakref

import pytest
import torch
from torch import nn

from alphaprune import ParallelModel, UsageError
from alphaprune.memory import memory
from alphaprune.models import vgg16

MIB = 2**20


class Ends(nn.Module):
    """Is ended by the system, as where memory is short."""

    def forward(self, x):
        import os

        os._exit(9)


def test_weights_and_activations_are_in_it():
    """64 MiB of weights and, in each pass, 64 MiB of what the layer gives."""
    network = nn.Linear(4096, 4096, bias=False)
    found = memory(network, torch.zeros(4096, 4096), seconds=0.2)
    assert 120 * MIB < found.peak - found.baseline < 400 * MIB
    assert found.baseline > 20 * MIB and found.baseline < found.average <= found.peak and found.samples > 1


def test_training_takes_more_than_looking_and_narrow_less_than_wide():
    x = torch.randn(64, 3, 32, 32)
    wide, narrow = vgg16(0.5), vgg16(0.125)
    trained, looked, small = (
        m.peak - m.baseline
        for m in (memory(wide, x, 0.2, training=True), memory(wide, x, 0.2), memory(narrow, x, 0.2))
    )
    assert trained > looked > small > 0
    assert all(p.grad is None for p in wide.parameters())  # nothing ran here


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Linear(3, 2), "Linear does not run in a process of its own: RuntimeError"),
        (Ends(), r"the process that measured Ends was ended \(exit code 9\); give fewer images"),
        (nn.Sequential(type("Local", (nn.Module,), {})()), "cannot be handed to another process"),
    ],
)
def test_what_cannot_be_measured_is_refused(network, message):
    with pytest.raises(UsageError, match=message):
        memory(network, torch.zeros(2, 5), seconds=0.1)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_a_forward_pass_holds_no_activation_longer_than_it_is_read(alpha):
    model = ParallelModel(vgg16(0.125), 0.34375, torch.randn(2, 3, 32, 32)).eval()
    model.alpha = alpha
    relus = [m for m in model.modules() if isinstance(m, torch.nn.ReLU)]
    made = []
    for relu in relus:
        relu.register_forward_hook(lambda layer, given, out: made.append(weakref.ref(out)))
    alive = []
    relus[-1].register_forward_hook(lambda *_: alive.append(sum(out() is not None for out in made)))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert len(made) >= 13 and max(alive) <= 4
