"""Plain narrow networks to train and to compare with: folded ones, the same from scratch, and Torch-Pruning's; and its choice of widths."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from alphaprune.errors import UsageError
from alphaprune.fold import fold
from alphaprune.parallel import ParallelModel
from alphaprune.widths import choose, costs


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
    network = copy.deepcopy(network).eval()
    if isinstance(keep_ratio, Mapping):
        by_layer = {network.get_submodule(name): 1 - share for name, share in keep_ratio.items()}
        ratios: dict[str, Any] = {"pruning_ratio": 0.0, "pruning_ratio_dict": by_layer}
    else:
        ratios = {"pruning_ratio": 1 - keep_ratio}
    pruner = _pruner(network, importance, example_input, **ratios)
    with torch.enable_grad():
        pruner.step()
    return network


def ranked_shares(
    network: nn.Module, keep_ratio: float, importance: str, example_input: Tensor
) -> dict[str, float]:
    """The keep_ratio of each layer by one threshold over all of them, as torch-pruning's global pruning has it.

    Channels go in the order of their importance, divided by its mean over the layers that are tied together, until the
    network takes no more multiply-adds than with `keep_ratio` for all. Parameters are not looked at.

    Args:
        network, importance, example_input: as of `torch_pruning`.
        keep_ratio: share of the channels that would stay in every layer, in (0, 1].

    Returns:
        By layer name; `torch_pruning` with it removes the channels below the threshold.

    Raises:
        UsageError: if a layer would lose all its channels before (the package itself then leaves that layer whole);
            if `keep_ratio` leaves none of a layer's; or if the package is not installed.
    """
    structure = ParallelModel(network, keep_ratio, example_input).structure

    def cost(shares: float | Mapping[str, float]) -> int:
        return sum(row["multiply_adds"] for row in costs(structure, choose(structure, shares)))

    scores = _scores(network, importance, example_input)

    def shares(removed: int) -> dict[str, float]:
        threshold = ranking[removed]  # of the first channel that stays
        left = {names: int((score >= threshold).sum()) for names, score in scores.items()}
        # A little more than k / C, since k is rounded down from it.
        return {n: min((k + 0.5) / len(scores[names]), 1.0) for names, k in left.items() for n in names}

    ranking = torch.cat(list(scores.values())).sort().values
    lasting = min(float(score.max()) for score in scores.values())  # beyond this a layer would be empty
    most = int((ranking < lasting).sum())
    budget = cost(keep_ratio)
    removed = bisect_left(range(most + 1), True, key=lambda n: cost(shares(n)) <= budget)
    if removed > most:
        raise UsageError(
            f"keep_ratio {keep_ratio:g} is too small to rank channels over all layers by {importance!r}: one would lose all of its own; give a larger one"
        )
    return shares(removed)


def _scores(network: nn.Module, importance: str, example_input: Tensor) -> dict[tuple[str, ...], Tensor]:
    """The package's importance of each channel, (C,), by the names of the layers that are tied together."""
    pruner = _pruner(copy.deepcopy(network).eval(), importance, example_input, global_pruning=True)
    name_of = {m: name for name, m in pruner.model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    found = {}
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        makes = (dep.target.module for dep, _ in group if pruner.DG.is_out_channel_pruning_fn(dep.handler))
        found[tuple(name_of[m] for m in makes if m in name_of)] = pruner.estimate_importance(group)
    return found


def _pruner(network: nn.Module, importance: str, example_input: Tensor, **options: Any) -> Any:
    """The package's pruner, which cuts `network` itself."""
    try:
        from torch_pruning.pruner import BasePruner
        from torch_pruning.pruner.importance import BNScaleImportance, GroupMagnitudeImportance
    except ImportError:
        raise UsageError("the package torch-pruning is missing; run `make environment`") from None
    measure = {
        "l1": lambda: GroupMagnitudeImportance(p=1),
        "l2": lambda: GroupMagnitudeImportance(p=2),
        "bn": BNScaleImportance,
    }[importance]()
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1:]  # gives the classes
    with torch.enable_grad():
        return BasePruner(network, example_input, measure, ignored_layers=last, **options)
