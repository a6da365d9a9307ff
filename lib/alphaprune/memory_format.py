"""The order of a network's numbers in memory."""

from __future__ import annotations

import torch
from torch import nn


def channels_last(network: nn.Module) -> nn.Module:
    """The network itself, with its tensors of four dimensions in channels_last memory format.

    `network.to(memory_format=...)` takes those of five for such too, as Conv3d has, and refuses them.
    """
    for t in (*network.parameters(), *network.buffers()):
        if t.dim() == 4:
            t.data = t.data.to(memory_format=torch.channels_last)
    return network
