"""Convolutions that oneDNN must not compute.

On a CPU with AVX2 and nothing newer, the gradients of a convolution of 1 x 1 with stride 2 that reads 2 to 7 channels in channels_last order are written
beyond their memory, and the process dies (torch 2.15.0; of 22 shapes tried all eight such ones, and no other). The shortcuts of a narrow ResNet-20 are such.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from alphaprune.parallel import ParallelModel

CHANNELS = range(2, 8)  # that are read


@contextmanager
def without_them(model: nn.Module) -> Iterator[None]:
    """A context in which a model is trained by torch's own kernels where it has such a convolution, and the CPU is such a one."""
    onednn = torch.backends.mkldnn
    before = onednn.enabled
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and any(n in CHANNELS for n in _read(model)):
        onednn.enabled = False
    try:
        yield
    finally:
        onednn.enabled = before


def _read(model: nn.Module) -> Iterator[int]:
    """Channels that the model's strided convolutions of 1 x 1 read, and those of its narrow program."""
    for layer in model.modules():
        if _is_strided(layer):
            yield layer.in_channels
    if isinstance(model, ParallelModel):
        for m in model.mixers:
            if m.key in model.expand and _is_strided(model.network.get_submodule(m.name)):
                yield model.expand[m.key].weight.shape[1] * m.groups


def _is_strided(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1} and max(layer.stride) > 1
