"""Float32 in whole where networks are compared or fitted.

A GPU convolves in TF32 unless it is told not to: float32 with 10 bits of fraction in place of 23, off by 1e-3 where
rounding explains 1e-4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 inside the block, or the function it decorates; behind it convolutions and products are as precise as before.

    Source:
        "TensorFloat-32 (TF32) on Ampere (and later) devices" in torch's notes on CUDA.
    """
    # Not torch's older `allow_tf32` and `cudnn.flags`, which raise where somebody has set these newer ones.
    places = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    was = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, was, strict=True):
            place.fp32_precision = precision
