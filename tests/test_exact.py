"""Where float32 is compared with float32, no GPU may round it to fewer bits."""

import pytest
import torch
from torch import nn

from alphaprune import ParallelModel, fold, optimise_for_inference
from alphaprune.exact import full_float32
from alphaprune.skips import SkipModel, remove_skips

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def precision():
    b = torch.backends
    return b.cudnn.conv.fp32_precision, b.cuda.matmul.fp32_precision


@pytest.fixture(params=["torch's defaults", "legacy", "new"])
def before(request):
    """What may have been set before, in torch's older or newer words."""
    b, was = torch.backends, precision()
    if request.param == "legacy":
        b.cuda.matmul.allow_tf32 = True
    elif request.param == "new":
        b.cudnn.conv.fp32_precision, b.cuda.matmul.fp32_precision = "ieee", "tf32"
    yield precision()
    b.cuda.matmul.allow_tf32 = False
    b.cudnn.conv.fp32_precision, b.cuda.matmul.fp32_precision = was


def test_float32_is_whole_inside_and_all_is_as_before_behind(before):
    with full_float32():
        assert precision() == ("ieee", "ieee")
    assert precision() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        1 / 0  # noqa: B018
    assert precision() == before


class Watched(nn.Module):
    """A network that notes how precise float32 is whenever it runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.sigmoid, self.head = nn.Sigmoid(), nn.Linear(6, 4)
        self.seen = seen = []
        self.sigmoid.register_forward_hook(lambda *_: seen.append(precision()))

    def forward(self, x):
        x = self.sigmoid(self.first(x))
        return self.head((x + self.second(x)).mean((2, 3)))


def test_whatever_compares_or_fits_computes_so():
    whole, network = ("ieee", "ieee"), Watched()
    optimise_for_inference(network, IMAGES)
    assert network.seen[-2:] == [whole] * 2  # the network, optimised and not
    for init, runs in (("select", 3), ("least_squares", 5)):
        network.seen.clear()
        model = ParallelModel(network, 0.5, IMAGES, init=init, images=IMAGES)
        assert network.seen.count(whole) == runs
    model.alpha = 0.0
    network.seen.clear()
    fold(model)
    assert network.seen == [whole] * 2
    annealed = SkipModel(network, IMAGES)
    annealed.alpha = 0.0
    network.seen.clear()
    remove_skips(annealed, IMAGES)
    assert network.seen == [whole] * 2
