"""Torch-Pruning's own choice of widths: what its global pruning removes, for as many multiply-adds as one keep_ratio for all."""

from __future__ import annotations

import copy
from bisect import bisect_left

import pytest
import torch
from torch import nn

from alphaprune.errors import UsageError
from alphaprune.measure import multiply_adds
from alphaprune.models import resnet20, vgg16
from alphaprune.narrowing import folded_at_once, ranked_shares, torch_pruning

NETWORKS = {"VGG-16": lambda: vgg16(0.125), "ResNet-20": lambda: resnet20(0.5)}
IMPORTANCES = ("l1", "l2", "bn")


def network_and_image(make, seed):
    """Channels of uneven importance."""
    torch.manual_seed(seed)
    network = make().eval()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= torch.rand(len(layer.weight), 1, 1, 1) + 0.5
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
    return network, torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_ranked_shares_are_of_the_first_global_pruning_that_costs_no_more(make, importance, seed):
    from torch_pruning.pruner import BasePruner
    from torch_pruning.pruner.importance import BNScaleImportance, GroupMagnitudeImportance

    network, image = network_and_image(make, seed)
    ours = torch_pruning(network, ranked_shares(network, 0.6, importance, image), importance, image)
    measure = {
        "l1": lambda: GroupMagnitudeImportance(p=1),
        "l2": lambda: GroupMagnitudeImportance(p=2),
        "bn": BNScaleImportance,
    }[importance]

    def theirs(removed):
        cut = copy.deepcopy(network)
        last = [m for m in cut.modules() if isinstance(m, nn.Linear)]
        options = {"ignored_layers": last, "global_pruning": True, "pruning_ratio": removed / 1024}
        BasePruner(cut, image, measure(), **options).step()
        return cut

    # Until a layer would be empty, what is removed at one ratio is removed at every larger one.
    budget = multiply_adds(folded_at_once(network, 0.6, image), image)
    removed = bisect_left(range(600), True, key=lambda n: multiply_adds(theirs(n), image) <= budget)
    state = theirs(removed).state_dict()
    assert all(torch.equal(v, state[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_one_ratio_of_one_is_the_whole_network(make):
    network, image = network_and_image(make, 0)
    assert set(ranked_shares(network, 1.0, "l2", image).values()) == {1.0}


def test_a_ratio_that_would_empty_a_layer_is_refused():
    """All channels of one layer equal the mean, so it is empty as soon as the threshold is above that."""
    network, image = network_and_image(NETWORKS["VGG-16"], 0)
    scales = [m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    nn.init.constant_(scales[1], 1.0)
    assert "features.3" in (found := ranked_shares(network, 0.8, "bn", image))
    assert found["features.3"] == 1 > min(found.values())
    with pytest.raises(UsageError, match="too small to rank channels over all layers by 'bn'"):
        ranked_shares(network, 0.2, "bn", image)
    with pytest.raises(UsageError, match="leaves none of the 8 channels"):
        ranked_shares(network, 0.1, "bn", image)
