"""Networks in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; behind it every module has the mode it had, frozen BatchNorms among them."""
    was = [(network, {m: m.training for m in network.modules()}) for network in networks]
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for network, modes in was:
            network.train(modes[network])  # train() may do more than set a flag
            for module, mode in modes.items():
                module.training = mode
