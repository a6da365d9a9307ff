"""A network's weights from a file: every one of them, of the same shape and kind, or one line that says what differs."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from alphaprune.errors import UsageError
from alphaprune.storage import load_tensors


class WrongWeights(UsageError):
    """A file of weights that are of another network."""


def load_weights(network: nn.Module, path: Path) -> None:
    """Put the weights in a file that `storage.save_tensors` wrote into a network.

    `load_state_dict` alone would turn whole numbers or other precisions into the network's without a word.

    Raises:
        UsageError: if the file or its checksum is missing, or they disagree.
        WrongWeights: if names, shapes or dtypes differ from the network's, or a weight is not finite.
    """
    tensors, _ = load_tensors(path)
    own = network.state_dict()
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise WrongWeights(f"{path} is of another network: '{missing[0]}' is in only one of them")
    for name, value in own.items():
        given = tensors[name]
        if given.shape != value.shape or given.dtype != value.dtype:
            raise WrongWeights(
                f"{path} is of another network: '{name}' is {given.dtype} {tuple(given.shape)}, not {value.dtype} {tuple(value.shape)}"
            )
        if not given.isfinite().all():
            raise WrongWeights(f"{path}: '{name}' holds NaN or infinities; make the weights again")
    network.load_state_dict(tensors)
