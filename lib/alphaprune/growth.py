"""How the cost of a training step grows with width, keep_ratio, depth and image size, beside what multiply-adds predict."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from alphaprune.fold import fold
from alphaprune.footprint import MIB
from alphaprune.measure import multiply_adds, parameters
from alphaprune.memory import memory
from alphaprune.models import ResNet, vgg16
from alphaprune.parallel import ParallelModel
from alphaprune.passes import training_step
from alphaprune.timing import alternate

WIDTH, KEEP_RATIO, DEPTH, IMAGE_SIZE = "width", "keep_ratio", "depth", "image size"
SECONDS_OF_MEMORY = 0.5  # a network is watched for, or one step if that takes longer


@dataclass(frozen=True)
class _Point:
    """A network at one place of an axis, and a batch for it."""

    network: nn.Module
    batch: Tensor


def growth(
    axes: Mapping[str, Sequence[float]],
    batch: int = 32,
    width: float = 1.0,
    seconds: float = 3.0,
    threads: int | None = None,
) -> pd.DataFrame:
    """Measure a training step along one axis after the other; the networks of an axis take turns.

    Args:
        axes: by axis the places on it, of which the largest is the reference: "width", a factor on VGG-16's channels; "keep_ratio", what a VGG-16 is
            narrowed to, folded ("plain") and with its branches at alpha 0 ("at alpha 0"); "depth", of a ResNet for small images, 6 n + 2; "image size", of
            a ResNet-20, in pixels, a multiple of 4.
        batch: images a step.
        width: of the VGG-16 on the axis keep_ratio.
        seconds: of timing an axis, for five rounds at least.
        threads: that torch may use; those it has if None.

    Returns:
        One row an axis, place and network: `axis`, `at`, `network`; `milliseconds` (median of a step), `spread`, `runs`, `others`, `trusted`, `threads` as of
        `timing.alternate`; `memory`, MiB that a step holds at most above the baseline, as of `memory.memory`, `parameters` and
        `multiply_adds` (of one image, forward) of plain networks; `time_share`, `memory_share` and `predicted`, the multiply-adds' share, of those
        of the plain network at the reference. The reference of the axis keep_ratio is 1.0, the network that is narrowed.
    """
    networks: dict[str, Callable[[float], dict[str, _Point]]] = {
        WIDTH: lambda at: {"plain": _Point(vgg16(at), torch.randn(batch, 3, 32, 32))},
        KEEP_RATIO: lambda at: _narrowed(width, at, batch),
        DEPTH: lambda at: {"plain": _Point(ResNet(blocks=(int(at) - 2) // 6), torch.randn(batch, 3, 32, 32))},
        IMAGE_SIZE: lambda at: {"plain": _Point(ResNet(), torch.randn(batch, 3, int(at), int(at)))},
    }
    parts = []
    for axis, places in axes.items():
        places = [*places, 1.0] if axis == KEEP_RATIO else places
        points = {(at, name): p for at in sorted(places) for name, p in networks[axis](at).items()}
        parts.append(_measured(axis, points, seconds, threads))
    return pd.concat(parts, ignore_index=True)


def _narrowed(width: float, keep_ratio: float, batch: int) -> dict[str, _Point]:
    x = torch.randn(batch, 3, 32, 32)
    if keep_ratio == 1:
        return {"plain": _Point(vgg16(width), x)}
    model = ParallelModel(vgg16(width), keep_ratio, x[:2])
    model.alpha = 0.0
    return {"plain": _Point(fold(model)[0], x), "at alpha 0": _Point(model, x)}


def _measured(
    axis: str, points: dict[tuple[float, str], _Point], seconds: float, threads: int | None
) -> pd.DataFrame:
    # Memory and cost first: a training step changes the network.
    rows: list[dict[str, Any]] = []
    for (at, name), p in points.items():
        held, cost = None, {}
        if not isinstance(p.network, ParallelModel):  # whose cost is partly one of a step and not of an image
            cost = {
                "parameters": parameters(p.network),
                "multiply_adds": multiply_adds(p.network, p.batch[:1]),
            }
            found = memory(p.network, p.batch, SECONDS_OF_MEMORY, threads, training=True)
            held = (found.peak - found.baseline) / MIB
        rows.append({"axis": axis, "at": at, "network": name, "memory": held} | cost)
    steps = {f"{at:g} {name}": training_step(p.network, p.batch) for (at, name), p in points.items()}
    times = alternate(steps, seconds, threads).reset_index(drop=True)
    table = pd.DataFrame(rows).join(times[["spread", "runs", "others", "trusted", "threads"]])
    table.insert(3, "milliseconds", 1000 * times["median"])
    reference = table[table["network"] == "plain"].iloc[-1]
    for share, of in (
        ("time_share", "milliseconds"),
        ("memory_share", "memory"),
        ("predicted", "multiply_adds"),
    ):
        table[share] = table[of] / reference[of]
    return table
