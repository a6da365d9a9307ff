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


class Replayed:
    """The same from a CUDA graph: all its kernels are started together, so that none waits for Python (source: as of `captured`).

    Called, it returns the answer to what `inputs` hold then; the answer is valid until the next call.

    Args:
        network, inputs: on a GPU, in eval mode, whose kernels ask nothing of the CPU. The graph reads and writes where they lie, so they stay alive with this.

    Raises:
        RuntimeError: if the network cannot be recorded, such as for a layer that waits for the GPU.
    """

    def __init__(self, network: nn.Module, *inputs: Tensor):
        self.network, self.inputs, self.graph = network, inputs, torch.cuda.CUDAGraph()
        main, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(main)
        try:
            with torch.no_grad():
                with torch.cuda.stream(aside):
                    for _ in range(WARM_UP):
                        network(*inputs)
                torch.cuda.synchronize()
                with torch.cuda.graph(self.graph):
                    self.answer = network(*inputs)
        finally:
            torch.cuda.set_stream(main)  # a recording that failed may leave another one current

    def __call__(self) -> Tensor:
        self.graph.replay()
        return self.answer


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
