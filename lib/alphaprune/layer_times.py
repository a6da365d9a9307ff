"""Where the time goes: each layer of an original and of a pruned network, beside what its multiply-adds predict."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from alphaprune.inference import optimise_for_inference
from alphaprune.passes import forward
from alphaprune.timing import alternate


def layer_times(
    original: nn.Module,
    pruned: nn.Module,
    example_input: Tensor,
    seconds: float = 5.0,
    threads: int | None = None,
) -> pd.DataFrame:
    """Time every convolution, with the ReLU in its kernel, and linear layer of two networks on the CPU, both optimised for inference, in turns.

    Args:
        original, pruned: networks whose layers have the same names, in eval mode.
        example_input: the batch, (N, C, H, W).
        seconds, threads: as of `timing.alternate`.

    Returns:
        One row a layer, in the order of computation: `layer`, `channels` and `channels_pruned` ("in -> out"), `milliseconds` and
        `milliseconds_pruned` (medians), `faster`, `predicted`, the multiply-adds of the one by those of the other, and `reached`, faster by predicted. The last row, `all
        else`, is what the rest of the network takes.
    """
    parts = []
    for network in (original, pruned):
        fast, times = optimise_for_inference(network, example_input), {}
        names = [n for n, m in fast.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for name in names:
            _watch(fast.get_submodule(name), times.setdefault(name, []))
        # As they were before channels of zeros came to them.
        layers = {name: network.get_submodule(name) for name in names}
        parts.append((forward(fast, example_input), layers, times))
    whole = alternate({"original": parts[0][0], "pruned": parts[1][0]}, seconds, threads)["median"]
    rows: list[dict[str, Any]] = []
    for name, layer in parts[0][1].items():
        narrow = parts[1][1][name]
        wide_ms, narrow_ms = (1000 * float(np.median(times[name])) for _, _, times in parts)
        row = {"layer": name, "channels": _channels(layer), "channels_pruned": _channels(narrow)}
        row |= {"milliseconds": wide_ms, "milliseconds_pruned": narrow_ms, "faster": wide_ms / narrow_ms}
        row["predicted"] = (
            layer.weight.numel() / narrow.weight.numel()
        )  # each weight is used equally often in both
        rows.append(row | {"reached": row["faster"] / row["predicted"]})
    table = pd.DataFrame(rows)
    rest = [
        1000 * whole[name] - table[column].sum()
        for name, column in (("original", "milliseconds"), ("pruned", "milliseconds_pruned"))
    ]
    last = {"layer": "all else", "channels": "", "channels_pruned": "", "milliseconds": rest[0]}
    last |= {"milliseconds_pruned": rest[1], "faster": rest[0] / rest[1]}
    return pd.concat([table, pd.DataFrame([last])], ignore_index=True)


def _watch(layer: nn.Module, times: list[float]) -> None:
    started: list[float] = []

    def before(*_: Any) -> None:
        started[:] = [time.perf_counter()]

    def after(*_: Any) -> None:
        times.append(time.perf_counter() - started[0])

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def _channels(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"{layer.in_features} -> {layer.out_features}"
    return f"{layer.in_channels} -> {layer.out_channels}"
