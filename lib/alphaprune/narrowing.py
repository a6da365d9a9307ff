"""Plain narrow networks to train and to compare with: folded ones, the same from scratch, and Torch-Pruning's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.errors import UsageError
from alphaprune.fold import fold
from alphaprune.parallel import ParallelModel


def folded_at_once(
    network: nn.Module, keep_ratio: float | Mapping[str, float], example_input: Tensor, round_to: int = 1
) -> nn.Module:
    """What a network folds to with new random branches, in eval mode: its cost is right, its weights are not.

    Args:
        network: the pretrained network.
        keep_ratio, round_to: as of `ParallelModel`.
        example_input: (1, C, H, W).
    """
    model = ParallelModel(network, keep_ratio, example_input, round_to=round_to)
    model.alpha = 0.0
    return fold(model)[0]


def from_scratch(model: ParallelModel) -> nn.Module:
    """The network that `model` folds to, with random weights: He's for convolutions, torch's own for the rest.

    Draws from torch's random state.
    """
    model = copy.deepcopy(model)
    model.alpha = 0.0
    small, _ = fold(model, force=True)
    for layer in small.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return small


def torch_pruning(
    network: nn.Module, keep_ratio: float | Mapping[str, float], importance: str, example_input: Tensor
) -> nn.Module:
    """A copy of a network, cut by the package torch-pruning (Fang et al., "DepGraph", 2023) in one step.

    Args:
        network: the pretrained network.
        keep_ratio: share of the channels that stay, in (0, 1]; or one a layer by its name, where layers not named stay whole.
        importance: "l1" or "l2", the norm of all weights of a group; "bn", the scale of BatchNorm.
        example_input: (1, C, H, W).

    Raises:
        UsageError: if the package is not installed.
    """
    try:
        from torch_pruning.pruner import BasePruner
        from torch_pruning.pruner.importance import BNScaleImportance, GroupMagnitudeImportance
    except ImportError:
        raise UsageError("the package torch-pruning is missing; run `make environment`") from None
    network = copy.deepcopy(network).eval()
    measure = {
        "l1": lambda: GroupMagnitudeImportance(p=1),
        "l2": lambda: GroupMagnitudeImportance(p=2),
        "bn": BNScaleImportance,
    }[importance]()
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1:]  # gives the classes
    with torch.enable_grad():
        if isinstance(keep_ratio, Mapping):
            by_layer = {network.get_submodule(name): 1 - share for name, share in keep_ratio.items()}
            ratios: dict[str, Any] = {"pruning_ratio": 0.0, "pruning_ratio_dict": by_layer}
        else:
            ratios = {"pruning_ratio": 1 - keep_ratio}
        BasePruner(network, example_input, measure, ignored_layers=last, **ratios).step()
    return network
