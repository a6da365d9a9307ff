"""Dead channels, behind every call of every ReLU."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from alphaprune.dead import dead_channels
from alphaprune.models import resnet20, vgg16

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_row_for_each_call_of_a_relu():
    assert dead_channels(vgg16(0.125), IMAGES).layer.is_unique
    table = dead_channels(resnet20(), IMAGES)
    assert len(table) == 19 and table.layer.is_unique
    assert table.layer.tolist()[:4] == ["relu", "blocks.0.relu", "blocks.0.relu:2", "blocks.1.relu"]
    assert len(dead_channels(resnet50(), IMAGES)) == 49


class Shared(nn.Module):
    """One ReLU behind a layer whose second channel is always below 0, and behind one where none is."""

    def __init__(self):
        super().__init__()
        self.first, self.relu, self.second = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.first.bias[1] = -1e3
            self.second.bias += 1e3

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x))))


@pytest.mark.parametrize("images", [6, 300])
def test_calls_are_told_apart_in_every_batch(images):
    torch.manual_seed(0)
    table = dead_channels(Shared(), torch.randn(images, 3, 8, 8))
    assert dict(zip(table.layer, table.dead, strict=True)) == {"relu": 0.25, "relu:2": 0.0}
