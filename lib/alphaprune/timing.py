"""How long things take, side by side: the alternatives take turns, so that whatever else the machine does falls on all of
them alike.

A measurement is trusted if the middle half of its runs spans at most 15 % of their median. Where it spans more, the machine was busy
with something else, and the table says so.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils import benchmark

from alphaprune.errors import UsageError

TRUSTED_SPREAD = 0.15  # interquartile range over median
ROUNDS = 5  # at least; of fewer, quartiles say nothing
BLOCK = 0.02  # seconds that what is faster is repeated for, each time it is its turn
COLUMNS = ["median", "iqr", "spread", "runs", "ratio", "trusted", "threads"]


def alternate(
    alternatives: Mapping[str, Callable[[], Any]], seconds: float = 5.0, threads: int | None = None
) -> pd.DataFrame:
    """Time functions in turns, one block of each in a round, until the time is up.

    Each is called once for a start that does not count. What takes less than 20 ms is repeated in its turn until that is reached, behind
    one call that does not count and brings its data back into the caches; its time is the mean over that block. Clock and wait for the GPU
    are those of `torch.utils.benchmark`, whose own loop times one function after another and not in turns.

    Args:
        alternatives: by name what to call, without arguments. The first is what the others are compared with.
        seconds: for all of them together, but for five rounds at least.
        threads: that torch may use meanwhile; those it has if None.

    Returns:
        One row a name (the index, called `alternative`): `median` and `iqr`, the interquartile range, in seconds a call; `spread`, the iqr as
        a share of the median; `runs`, how many blocks were timed; `ratio`, how many times as fast as the first it is: the
        median over rounds of the first's time over its own in the same round; `trusted`, whether the spread is at most
        `TRUSTED_SPREAD`; `threads`.

    Raises:
        UsageError: if there is nothing to time, or seconds or threads are no positive numbers.

    Example:
        >>> table = alternate({"wide": lambda: sum(range(4000)), "narrow": lambda: sum(range(1000))}, seconds=0.2)
        >>> bool(table.at["narrow", "ratio"] > 2)
        True
    """
    if not alternatives:
        raise UsageError("there is nothing to time; give functions by name")
    if not seconds > 0 or (threads is not None and threads < 1):
        raise UsageError(f"seconds is {seconds} and threads {threads}; give positive numbers")
    timers = {name: timeit.Timer(f, timer=benchmark.timer) for name, f in alternatives.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    with torch_threads(threads):
        calls = {name: _calls_in_a_block(t) for name, t in timers.items()}
        started = benchmark.timer()
        while len(times[next(iter(times))]) < ROUNDS or benchmark.timer() - started < seconds:
            for name, t in timers.items():
                if calls[name] > 1:
                    t.timeit(1)
                times[name].append(t.timeit(calls[name]) / calls[name])
        table = pd.DataFrame(_row(own, times[next(iter(times))]) for own in times.values())
        table["threads"] = torch.get_num_threads()
    return table.set_index(pd.Index(times, name="alternative"))[COLUMNS]


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """This many threads inside the block, behind it as many as before; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _calls_in_a_block(timer: timeit.Timer) -> int:
    timer.timeit(1)  # the first call is not like the others: memory is asked for, kernels are chosen
    taken = min(timer.timeit(1) for _ in range(2))
    return max(1, int(BLOCK / max(taken, 1e-9)))


def _row(own: list[float], first: list[float]) -> dict[str, Any]:
    low, median, high = np.quantile(own, [0.25, 0.5, 0.75])
    spread = float((high - low) / median)
    return {
        "median": float(median),
        "iqr": float(high - low),
        "spread": spread,
        "runs": len(own),
        "ratio": float(np.median(np.divide(first, own))),
        "trusted": spread <= TRUSTED_SPREAD,
    }
