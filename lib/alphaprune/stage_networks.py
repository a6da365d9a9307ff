"""The network that a stage begins with, and the one that it left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from alphaprune import pretrained
from alphaprune.errors import Damaged
from alphaprune.fold import fold
from alphaprune.identity import BASE, Node
from alphaprune.layer_widths import first_images, ratios
from alphaprune.models import NETWORKS, example_image
from alphaprune.narrowing import from_scratch, torch_pruning
from alphaprune.parallel import ParallelModel
from alphaprune.schedule import staggered
from alphaprune.settings import Stage
from alphaprune.skips import SkipModel
from alphaprune.stages import Stages
from alphaprune.train import derive_seed
from alphaprune.weights import load_weights

STATISTICS_BATCH = 250  # images, for BatchNorm


class StageNetworks:
    """The networks of an experiment's stages.

    Args:
        of: the experiment; weights are read where it says.

    Attributes:
        least_squares: of the branches that were fitted last, as of `ParallelModel`; None where none were.
    """

    def __init__(self, of: Stages):
        self.of = of
        self.least_squares: dict[str, Any] | None = None

    def begun(self, node: Node) -> nn.Module:
        """The model a stage trains, with the weights it starts from."""
        if node.narrowed_at:
            model = self._narrow(node.narrowed_at)
            if node.narrowed_at is not node:
                self._load(model, node.parent)
            return model
        if isinstance(node.parent, Node) and node.parent.stage.alpha is not None and not node.stage.refit:
            model = self._parallel(node)
            self._load(model, node.parent)
        elif node.stage.alpha is None:
            model = self._network(node)
        else:
            model = self._parallel(node, fitted=True)
        if node.stage.alpha is not None:
            set_alpha(model, node.stage, node.stage.alpha_at(0))
        if isinstance(model, ParallelModel):
            model.train_wide = node.stage.train_wide
            model.hold_batchnorm = node.stage.hold_batchnorm
        return model

    def trained(self, node: Node) -> nn.Module:
        """The model that a stage left, in eval mode: at its alpha, or plain where it has none. No weights but its own are needed."""
        if node.narrowed_at:
            model = self._narrow(node.narrowed_at, empty=True)
        elif node.stage.alpha is None:
            model = self._network(node, empty=True)
        else:
            model = self._parallel(node, empty=True)
        self._load(model, node)
        if node.stage.alpha is not None:
            set_alpha(model, node.stage, node.stage.alpha)
        return model.eval()

    def wide_program(self, node: Node) -> nn.Module:
        """The wide network of a stage with branches, as it is without them: its BatchNorms measure their statistics anew."""
        network = copy.deepcopy(self.trained(node).network)
        update_bn(first_images(node.settings).split(STATISTICS_BATCH), network)
        return network.eval()

    def pretrained(self, node: Node) -> nn.Module:
        """The pretrained network of a stage's settings."""
        return pretrained.network(node.settings, self.of.root)

    def _load(self, network: nn.Module, node: Node) -> None:
        """Put the weights that a stage left into a network."""
        try:
            load_weights(network, self.of.weights(node))
        except Damaged as e:  # since the run began, which would have trained it anew
            raise Damaged(
                f"{e}; run the same command again: stage {node.name} is then trained anew"
            ) from None

    # Of what follows, `empty` is a model of the same layers whose weights are to be loaded.

    def _narrow(self, node: Node, empty: bool = False) -> nn.Module:
        """The plain narrow network that a stage with `narrow` begins with."""
        how = node.stage.narrow
        torch.manual_seed(derive_seed(node.key, 0))
        if how.startswith("torch-pruning"):
            network = self._made(node) if empty else self.pretrained(node)
            shares = ratios(node.settings, self.of.root)
            return torch_pruning(network, shares, how.rpartition("-")[2], example_image())
        if isinstance(node.parent, Node) and not node.stage.refit:
            model = self._parallel(node.parent, empty=empty)
            if not empty:
                self._load(model, node.parent)
        else:
            model = self._parallel(node, fitted=how == "fold" and not empty, empty=empty)
        if how == "scratch":
            torch.manual_seed(derive_seed(node.key, 0))
            return from_scratch(model)
        model.alpha = 0.0
        return fold(model)[0]

    def _network(self, node: Node, empty: bool = False) -> nn.Module:
        """The plain network a stage trains, or that the branches are put beside."""
        if node.parent == BASE and not empty:
            return self.pretrained(node)
        torch.manual_seed(derive_seed(node.key, 0))
        network = self._made(node)
        if isinstance(node.parent, Node) and not empty:
            self._load(network, node.parent)
        return network

    def _made(self, node: Node) -> nn.Module:
        return NETWORKS[node.settings.network](node.settings.width)

    def _parallel(self, node: Node, fitted: bool = False, empty: bool = False) -> ParallelModel | SkipModel:
        """The model with an alpha around a stage's first ancestor; its branches depend on the seed alone.

        `fitted` starts them as the settings' `init` says; without, they wait for weights to be loaded.
        """
        first = node
        while (
            not first.stage.refit and isinstance(first.parent, Node) and first.parent.stage.alpha is not None
        ):
            first = first.parent
        refitted = first.stage.refit and isinstance(first.parent, Node)
        network = self.wide_program(first.parent) if refitted and not empty else self._network(first, empty)
        s = node.settings
        if s.anneal == "skips":
            return SkipModel(network, example_image())
        torch.manual_seed(derive_seed(s.seed, "branches"))
        init = node.stage.refit or s.init
        options: dict[str, Any] = {}
        if fitted and init != "random":
            options = {"init": init, "images": first_images(s), "select_by": s.select_by}
            if init == "least_squares":
                options["ridge"] = s.init_ridge
        # Behind the seed: finding the ratios draws random numbers too, and results recorded so far depend on it.
        model = ParallelModel(network, ratios(s, self.of.root), example_image(), **options)
        self.least_squares = model.least_squares
        return model


def set_alpha(model: ParallelModel | SkipModel, stage: Stage, alpha: float) -> None:
    """Give a stage's model an alpha, which its layers reach in the stage's order."""
    model.alpha = alpha if stage.order == "together" else staggered(alpha, len(model.expand), stage.order)
