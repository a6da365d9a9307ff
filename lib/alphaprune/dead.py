"""Which channels are dead: 0 behind their ReLU for every image.

They are looked for in eval mode, with BatchNorm's running statistics. Where all channels of a layer are dead no image gets past it, and what comes behind
answers the same for all. No gradient goes through a ReLU that is 0; but while a network trains BatchNorm uses the batch's statistics, and such a ReLU may open.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from alphaprune.modes import in_eval_mode


@torch.no_grad()
def dead_channels(network: nn.Module, images: Tensor) -> pd.DataFrame:
    """The share of dead channels behind every ReLU of a network in eval mode.

    Args:
        network: its ReLUs are modules, such as those of a folded VGG-16; it is left as it was.
        images: (N, C, H, W), some hundreds.

    Returns:
        A row a ReLU in the order of computation: `layer`, its name, and `dead`, in [0, 1].
    """
    alive: dict[str, Tensor] = {}
    calls: Counter[str] = Counter()  # of this batch

    def look(name: str, _: nn.Module, __: Any, out: Tensor) -> None:
        calls[name] += 1
        if calls[name] > 1:  # one module in several places: "relu", "relu:2" and so on
            name = f"{name}:{calls[name]}"
        some = (out.transpose(0, 1).flatten(1) > 0).any(1)
        alive[name] = alive.get(name, torch.zeros_like(some)) | some

    relus = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.ReLU)]
    hooks = [m.register_forward_hook(partial(look, name)) for name, m in relus]
    try:
        with in_eval_mode(network):
            for batch in images.split(250):
                calls.clear()
                network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return pd.DataFrame({"layer": list(alive), "dead": [1 - a.float().mean().item() for a in alive.values()]})
