"""What a network costs: parameters and multiply-adds."""

from __future__ import annotations

import math
from typing import Any

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
    with in_eval_mode(network), FlopCounterMode(display=False, custom_mapping=_MORE) as counter:
        network(image)
    return counter.get_total_flops() // 2


def _in_one_kernel(_: Any, *read: Any, out_shape: torch.Size, **__: Any) -> int:
    """Operations of a convolution with what follows in its kernel; what it reads begins with a residual, if there is one."""
    weight = read[1] if read[1] is not None and len(read[1]) > 1 else read[0]
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


_KERNEL = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # see `one_kernel`
_MORE = {_KERNEL: _in_one_kernel} if _KERNEL is not None else {}
