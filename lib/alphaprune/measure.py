"""What a network costs: parameters and multiply-adds."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from alphaprune.modes import in_eval_mode


def parameters(network: nn.Module) -> int:
    """Number of weights of a network, buffers left out."""
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiply-adds of convolutions and linear layers in one forward pass.

    Args:
        network: any module; run in eval mode, its mode is restored.
        image: the input, (1, C, H, W) for the count of one image.

    Source:
        torch.utils.flop_counter, which counts a multiplication and an addition as two.
    """
    with in_eval_mode(network), FlopCounterMode(display=False) as counter:
        network(image)
    return counter.get_total_flops() // 2
