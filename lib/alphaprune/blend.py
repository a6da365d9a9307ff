"""What a blend is made of: how much of the signal that mixers read still comes from the wide program.

    share = Var(alpha * wide) / (Var(alpha * wide) + Var((1 - alpha) * E(narrow)))

Alpha is a weight, not a share: BatchNorm divides by the size of what arrives, so a wide program at alpha 0.1 beside branches that vary
little is still most of what the next layer sees.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alphaprune.modes import in_eval_mode
from alphaprune.parallel import ParallelModel


@torch.no_grad()
def wide_share(model: ParallelModel, images: Tensor) -> dict[str, float]:
    """The share of the variance over images and places, summed over channels, that the wide program has in what each mixer reads.

    Args:
        model: at any alpha; it is left as it was.
        images: (N, C, H, W), two or more.

    Returns:
        By layer name, in [0, 1], for each mixer that reads a blend; those where neither program varies are left out.
    """
    found: dict[str, float] = {}
    names = {m.key: m for m in model.mixers if m.key in model.expand}
    alphas = model.alpha if isinstance(model.alpha, tuple) else (model.alpha,) * len(names)
    weights = dict(zip(names, alphas, strict=True))

    def variance(x: Tensor, dim: int) -> float:
        return x.movedim(dim, -1).flatten(0, -2).double().var(0, correction=0).sum().item()

    def observe(key: str, wide: Tensor | None, narrow: Tensor) -> None:
        a, mixer = weights[key], names[key]
        of_wide = 0.0 if wide is None or a == 0 else a**2 * variance(wide, mixer.dim)
        of_narrow = (1 - a) ** 2 * variance(model.expand[key](narrow), mixer.dim)
        if total := of_wide + of_narrow:
            found.setdefault(mixer.name, of_wide / total)

    before, model.observer = model.observer, observe
    try:
        with in_eval_mode(model):
            model(images)
    finally:
        model.observer = before
    return found
