"""One pass of a network as something to call, to be timed or watched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def forward(network: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    """A look at the inputs, without gradients, in the mode the network has."""

    def look() -> None:
        with torch.inference_mode():
            network(*inputs)

    return look


def training_step(network: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    """Forward and backward through the mean of the output, and a step of SGD with momentum, in training mode.

    It changes the network: weights and statistics of BatchNorm.
    """
    network.train()
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

    def step() -> None:
        optimiser.zero_grad()
        network(*inputs).mean().backward()
        optimiser.step()

    return step
