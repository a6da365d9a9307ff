"""What networks cost where they are used: time, throughput, memory, file, parameters, multiply-adds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from alphaprune.measure import multiply_adds, parameters
from alphaprune.memory import memory
from alphaprune.passes import forward
from alphaprune.storage import as_bytes
from alphaprune.timing import alternate

MIB = 2**20


def footprint(
    networks: Mapping[str, Mapping[str, nn.Module]],
    image: Tensor,
    batches: Sequence[int] = (1, 128),
    seconds: float = 5.0,
    threads: int | None = None,
    device: str | None = None,
) -> pd.DataFrame:
    """Measure networks in eval mode, as they are, those of one kind in turns.

    Args:
        networks: by kind, then by name, in eval mode; of each kind the first is what the others are compared with. They stay where they are.
        image: one, (1, C, H, W); a batch repeats it.
        batches: numbers of images at once.
        seconds: to time the networks of a kind at one number of images, all together; memory is watched for a fifth of it each.
        threads: that torch may use; those it has if None.
        device: what copies of the networks run on, such as "cpu" or "cuda"; a GPU if there is one, else the CPU, if None.

    Returns:
        One row a kind, network and batch: `kind`, `network`, `batch`, `device`; `milliseconds` (median), `iqr` (milliseconds), `spread`, `runs`, `faster` (than
        the kind's first), `others`, `trusted` and `threads` as of `timing.alternate`; `images_per_second`; `memory_average` and `memory_peak`, MiB above
        `memory_baseline`, as of `memory.memory`; `file` (bytes of the weights as safetensors), `parameters`, `multiply_adds` (of one image).
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    image = image.to(device)
    rows: list[dict[str, Any]] = []
    for kind, given in networks.items():
        own = {name: copy.deepcopy(network).to(device) for name, network in given.items()}
        for batch in batches:
            x = image.expand(batch, *image.shape[1:]).contiguous()
            times = alternate({name: forward(n, x) for name, n in own.items()}, seconds, threads)
            for name, network in own.items():
                t, m = times.loc[name], memory(network, x, seconds / 5, threads)
                rows.append(
                    {
                        "kind": kind,
                        "network": name,
                        "batch": batch,
                        "device": device,
                        "milliseconds": 1000 * t["median"],
                        "iqr": 1000 * t["iqr"],
                        "spread": t["spread"],
                        "runs": t["runs"],
                        "faster": t["ratio"],
                        "images_per_second": batch / t["median"],
                        "memory_average": (m.average - m.baseline) / MIB,
                        "memory_peak": (m.peak - m.baseline) / MIB,
                        "memory_baseline": m.baseline / MIB,
                        "file": len(as_bytes(network.state_dict())),
                        "parameters": parameters(network),
                        "multiply_adds": multiply_adds(network, image),
                        "others": t["others"],
                        "trusted": bool(t["trusted"]),
                        "threads": t["threads"],
                    }
                )
    return pd.DataFrame(rows)
