"""One pass of a network as something to call, to be timed or watched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from alphaprune.captured import WARM_UP


def forward(network: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    """A look at the inputs, without gradients, in the mode the network has."""

    def look() -> None:
        with torch.inference_mode():
            network(*inputs)

    return look


def replayed(network: nn.Module, *inputs: Tensor) -> Callable[[], None]:
    """The same from a CUDA graph: all its kernels are started together, so that none waits for Python (source: as of `captured`).

    Args:
        network, inputs: on a GPU, in eval mode, whose kernels ask nothing of the CPU. The answer lies where that of the recorded pass lay.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                network(*inputs)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            network(*inputs)
    return graph.replay


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
