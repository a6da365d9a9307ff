"""How fast it is on a CPU: ratios of what took turns in one run, and the targets that the project keeps to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn

from alphaprune.allocator import keep_freed_memory
from alphaprune.benchmark_device import compiled_on
from alphaprune.benchmark_rows import (
    KEEP_RATIO,
    SIZES,
    Sizes,
    Target,
    all_rows,
    in_order,
    run_once,
    timed_row,
)
from alphaprune.data import Split, batches
from alphaprune.deployment import deployment
from alphaprune.few_channels import REGISTER
from alphaprune.fold import fold
from alphaprune.models import vgg16
from alphaprune.narrowing import folded_at_once, torch_pruning
from alphaprune.parallel import ParallelModel
from alphaprune.passes import training_step
from alphaprune.timing import (
    alternate,
    moment,
    torch_threads,
)

ROUNDED = f"folded, multiples of {REGISTER}"
# A training step with branches, as a share of the plain network's.
STEP_TARGETS = {
    "alpha 1": Target(at_most=1.05),
    "alpha 0.5": Target(at_most=1.35),
    "alpha 0": Target(at_most=0.55),
}
SHARE_OF_PREDICTED = (
    0.9  # of the speed-up that multiply-adds predict, folded and optimised against the original as it is
)
DATA_TARGET = Target(at_least=10)  # times what the quarter-width network eats
FIT_TARGET = Target(at_most=60)  # seconds


def training_steps(width: float, batch: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Training steps of a VGG-16 with branches, and folded, as shares of the plain network's."""
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    steps = {"plain": training_step(in_order(vgg16(width)), x)}
    for alpha in (1.0, 0.5, 0.0):
        for frozen in (False, True):
            model = ParallelModel(vgg16(width), KEEP_RATIO, x[:2])
            model.alpha, model.train_wide = alpha, not frozen
            if alpha < 1 or not frozen:
                name = f"alpha {alpha:g}{', wide weights frozen' if frozen else ''}"
                steps[name] = training_step(in_order(model), x)
    steps["folded"] = training_step(in_order(folded_at_once(vgg16(width), KEEP_RATIO, x[:1])), x)
    what = f"training step, VGG-16 of width {width:g}, batch {batch}"
    times = alternate(steps, seconds, threads)
    return [
        timed_row(
            f"{what}: {name}", 1 / t.ratio, "of the plain network's", STEP_TARGETS.get(name, Target()), t
        )
        | {"milliseconds": 1000 * t.median}
        for name, t in zip(times.index, times.itertuples(), strict=True)
    ]


def data_path(width: float, batch: int, seconds: float) -> list[dict[str, Any]]:
    """How many times as many images as the network eats the data path gives, on one thread."""
    steps = 8
    split = Split(
        torch.randint(0, 256, (steps * batch, 3, 32, 32), dtype=torch.uint8),
        torch.zeros(steps * batch).long(),
    )
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    step = training_step(in_order(vgg16(width)), x)

    def feed() -> None:
        for _ in batches(split, batch, torch.Generator().manual_seed(0)):
            pass

    times = alternate({"step": lambda: [step() for _ in range(steps)], "data": feed}, seconds, 1)
    row = times.loc["data"]
    return [
        timed_row(
            f"data path, batch {batch}: images given",
            row["ratio"],
            f"times what a VGG-16 of width {width:g} trains on",
            DATA_TARGET,
            row,
        )
    ]


def inference(name: str, network: nn.Module, x: Tensor, threads: int, seconds: float) -> list[dict[str, Any]]:
    """The original, ours, ours rounded down to multiples of 16 channels, and Torch-Pruning's of our width, as they are and optimised, in turns.

    Rounded, it has to reach the same as without: a share of what the multiply-adds of the network that is not rounded predict.
    """
    networks = {
        "original": network.eval(),
        "folded": folded_at_once(network, KEEP_RATIO, x[:1]),
        ROUNDED: folded_at_once(network, KEEP_RATIO, x[:1], REGISTER),
        "Torch-Pruning": torch_pruning(network, KEEP_RATIO, "l1", x[:1]).eval(),
    }
    times = deployment(networks, x, ("as it is", "optimised"), seconds, threads)
    predicted = times.set_index("network")["predicted"]["folded"].iloc[0]
    reached = Target(at_least=round(SHARE_OF_PREDICTED * float(predicted), 2))
    rows = []
    for t in times.itertuples():
        target = reached if t.network in ("folded", ROUNDED) and t.way == "optimised" else Target()
        what = f"{name}, batch {len(x)}: {t.network}, {t.way}"
        row = timed_row(what, t.faster, f"times as fast; multiply-adds predict {t.predicted:.2f}", target, t)
        rows.append(row | {"milliseconds": t.milliseconds})
    ours, theirs = (
        times[(times["network"] == n) & (times["way"] == "optimised")].iloc[0]
        for n in ("folded", "Torch-Pruning")
    )
    what = f"{name}, batch {len(x)}: folded against Torch-Pruning, both optimised"
    both = timed_row(what, ours["faster"] / theirs["faster"], "times as fast", Target(), ours)
    both["spread"] = max(both["spread"], float(theirs["spread"]))
    both["trusted"] = both["trusted"] and bool(theirs["trusted"])
    return [*rows, both]


def once(width: float, images: int, threads: int) -> list[dict[str, Any]]:
    """What is done once for a network: seconds for the start by least squares, and for folding."""
    seen = torch.randn(images, 3, 32, 32)
    network = f"VGG-16 of width {width:g}"
    with torch_threads(threads):
        before = moment()
        model = ParallelModel(vgg16(width), KEEP_RATIO, seen[:2], init="least_squares", images=seen)
        fitted = run_once(f"start by least squares, {network}, {images} images", FIT_TARGET, before, threads)
        model.alpha = 0.0
        folding = alternate({"fold": lambda: fold(model)}, threads=threads).loc["fold"]
    return [
        fitted,
        timed_row(f"fold with its certificate, {network}", folding["median"], "seconds", Target(), folding),
    ]


def _on_one_thread(group: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """As `quick` trains."""
    with torch_threads(1):
        return group(*arguments)


def measure(sizes: Sizes = SIZES, say: Callable[[str], None] = print) -> pd.DataFrame:
    """All that is of a CPU, one row a figure.

    Returns:
        Columns `what`; `milliseconds` a call, where it was called more than once; `value`, NaN where it is not known, and its `unit`; `target`, a bound
        in words, and whether it `holds`, None where there is none; `spread`, `others`, `trusted` and `threads` as of `timing.alternate`.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    s = sizes
    groups: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "training, one thread": lambda: training_steps(s.quick_width, s.batch, 1, s.seconds),
        f"training, {s.threads} threads": lambda: training_steps(s.full_width, s.batch, s.threads, 2 * s.seconds),
        "data path": lambda: data_path(s.quick_width, s.batch, s.seconds / 10),
        "VGG-16": lambda: inference(f"VGG-16 of width {s.full_width:g}", vgg16(s.full_width), torch.randn(s.batch, 3, 32, 32), s.threads, s.seconds),
        "ResNet-18": lambda: inference("ResNet-18", torchvision.models.resnet18(), torch.randn(s.resnet_batch, 3, s.resnet_side, s.resnet_side), s.threads, s.seconds),
        "once": lambda: once(s.full_width, s.fit_images, s.threads),
    }  # fmt: skip
    x, of_width = torch.randn(s.batch, 3, 32, 32), f"VGG-16 of width {s.quick_width:g}"
    blended = ParallelModel(vgg16(s.quick_width), KEEP_RATIO, x[:2])
    blended.alpha = 0.5
    for name, network in (("plain", vgg16(s.quick_width)), ("alpha 0.5", blended)):
        groups[f"compiled, {name}"] = partial(
            _on_one_thread, compiled_on, "cpu", f"{of_width}, {name}", network, x, s.seconds / 10
        )
    return all_rows(groups, say)
