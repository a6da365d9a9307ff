"""What a blend is made of: how much of the signal that mixers read still comes from the wide program.

    share = Var(alpha * wide) / (Var(alpha * wide) + Var((1 - alpha) * E(narrow)))

Alpha is a weight, not a share: BatchNorm divides by the size of what arrives, so a wide program at alpha 0.1 beside branches that vary
little is still most of what the next layer sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from alphaprune.data import Dataset, Split, batches
from alphaprune.modes import in_eval_mode
from alphaprune.parallel import ParallelModel
from alphaprune.train import accelerator_for_this_machine, evaluate
from alphaprune.widths import KeepRatio

# For a network that is not trained: where it is looked at; the first validation images, which it is scored on; the first
# training images, which branches are fitted to and BatchNorm's statistics measured on.
UNTRAINED_ALPHAS = (1, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.0)
SCORED = 1000
MEASURED = 2000


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
        rows = x.movedim(dim, -1).flatten(0, -2)  # (places, channels)
        return (rows - rows.mean(0)).square_().mean(0).sum().item()  # a fifth of the time of var(0)

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


def fold_now(model: nn.Module, val: Split) -> float:
    """What a model would score, as a share of 1, if it were folded at this moment: its accuracy at alpha 0. It is left as it was.

    Args:
        model: one with an alpha, such as a `ParallelModel`.
        val: the images.
    """
    alpha, model.alpha = model.alpha, 0.0
    try:
        return evaluate(model, val, accelerator=accelerator_for_this_machine())[1]
    finally:
        model.alpha = alpha


def without_training(
    model: ParallelModel,
    alphas: Sequence[float],
    images: Sequence[Tensor],
    accuracy: Callable[[nn.Module], float],
) -> pd.DataFrame:
    """What a network scores at each alpha when nothing is trained, with BatchNorm's statistics as they are and measured anew.

    Args:
        model: it is copied.
        alphas: in [0, 1].
        images: batches (N, C, H, W) that the statistics are measured on.
        accuracy: of a network, a share of 1.

    Returns:
        Columns alpha, as_it_was, measured_anew, wide_share (the mean over mixers, with statistics anew; 1 at alpha 1, NaN where none varies).
    """
    rows = []
    for alpha in alphas:
        probe = copy.deepcopy(model).eval()
        probe.alpha = alpha
        as_it_was = accuracy(probe)
        update_bn(images, probe)
        shares = wide_share(probe, images[0])
        mean = 1.0 if alpha == 1 else sum(shares.values()) / len(shares) if shares else float("nan")
        rows.append(
            {"alpha": alpha, "as_it_was": as_it_was, "measured_anew": accuracy(probe), "wide_share": mean}
        )
    return pd.DataFrame(rows)


def untrained_table(
    pretrained: Callable[[], nn.Module],
    keep_ratio: KeepRatio,
    example_image: Tensor,
    data: Dataset,
    ridge: float,
) -> pd.DataFrame:
    """What a pretrained network scores at falling alpha beside random branches, and beside those by least squares, none of them trained.

    Args:
        pretrained: makes the network, such as `Experiment.base_network`.
        keep_ratio, ridge: as of `ParallelModel`.
        example_image: (1, C, H, W).
        data: the first `SCORED` validation and `MEASURED` training images are used.

    Returns:
        The columns of `without_training` at `UNTRAINED_ALPHAS`, and `init`, how the branches began.
    """
    val = data.val.first(min(SCORED, len(data.val)))
    seen = [x for x, _ in batches(data.train.first(min(MEASURED, len(data.train))), 250)]
    tables = []
    for init, fit in (("random", {}), ("least_squares", {"images": torch.cat(seen), "ridge": ridge})):
        torch.manual_seed(0)  # before the network too, whose making draws numbers
        model = ParallelModel(pretrained(), keep_ratio, example_image, init=init, **fit)
        table = without_training(model, UNTRAINED_ALPHAS, seen, lambda probe: evaluate(probe, val)[1])
        tables.append(table.assign(init=init))
    return pd.concat(tables, ignore_index=True)
