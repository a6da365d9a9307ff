"""How long things take, side by side: the alternatives take turns, so that whatever else the machine does falls on all of
them alike.

When to trust it: the middle half of the runs spans at most 15 % of their median, and other processes took less than a quarter of a core that torch would have used.
The spread alone does not tell. Beside one process that always computes, a network on two cores waits for the slower thread behind every
layer: measured so, a narrow VGG-16 was slower by half and more than alone, at a spread of 2 %.
"""

from __future__ import annotations

import os
import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch

from alphaprune.errors import UsageError

TRUSTED_SPREAD = 0.15  # of the runs, as a share of their median
TRUSTED_OTHERS = 0.25  # cores, beyond those that torch leaves free
ROUNDS = 5  # at least; of fewer, quartiles say nothing
BLOCK = 0.02  # seconds that what is faster is repeated for, each time it is its turn
COLUMNS = ["median", "iqr", "spread", "runs", "ratio", "others", "trusted", "threads"]


def alternate(
    alternatives: Mapping[str, Callable[[], Any]], seconds: float = 5.0, threads: int | None = None
) -> pd.DataFrame:
    """Time functions in turns, one block of each in a round, every second round backwards, until the time is up.

    Whoever's turn it is is called once without being timed, then timed: once, or as often as it takes to fill 20 ms, of which
    the mean counts. `torch.utils.benchmark` measures so too, with the same clock, but one function after another and not in turns.

    Args:
        alternatives: by name what to call, without arguments. The first is what the others are compared with.
        seconds: for all of them together, but for five rounds at least.
        threads: that torch may use meanwhile; those it has if None.

    Returns:
        One row a name (the index, called `alternative`): `median` and `iqr`, the interquartile range, in seconds a call; `spread`, the iqr as
        a share of the median; `runs`, how many blocks were timed; `ratio`, how many times as fast as the first it is: the
        median over rounds of the first's time over its own in the same round; `others`, how many cores other processes kept busy
        meanwhile; `trusted`, whether the spread is at most `TRUSTED_SPREAD`, and others at most `TRUSTED_OTHERS` more than the cores
        that `threads` leaves free; `threads`.

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
    timers = {name: timeit.Timer(f, timer=clock) for name, f in alternatives.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    first = times[next(iter(times))]
    with torch_threads(threads):
        calls = {name: _calls_in_a_block(t) for name, t in timers.items()}
        before, started = moment(), clock()
        while len(first) < ROUNDS or clock() - started < seconds:
            # Back and forth: to follow what is heavy, which warms the CPU and fills the memory, falls on no one alone.
            for name, t in list(timers.items())[:: 1 if len(first) % 2 == 0 else -1]:
                t.timeit(1)  # its numbers come back into the caches; threads of the one before go to sleep
                times[name].append(t.timeit(calls[name]) / calls[name])
        table = pd.DataFrame([_row(own, first) for own in times.values()])
        table["others"] = cores_of_others(before, moment())
        table["threads"] = torch.get_num_threads()
    table["trusted"] = [trusted(r.spread, r.others, r.threads) for r in table.itertuples()]
    return table.set_index(pd.Index(times, name="alternative"))[COLUMNS]


def clock() -> float:
    """Seconds, once a GPU is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
    return {
        "median": float(median),
        "iqr": float(high - low),
        "spread": float((high - low) / median),
        "runs": len(own),
        "ratio": float(np.median(np.divide(first, own))),
    }


def trusted(spread: float, cores: float, threads: int) -> bool:
    """Whether what was timed says anything.

    Args:
        spread: of the runs, as a share of their median.
        cores: that other processes kept busy meanwhile.
        threads: that were timed; the cores that they leave are free for others.
    """
    free = max(0, (psutil.cpu_count() or 1) - threads)
    return bool(spread <= TRUSTED_SPREAD and cores <= free + TRUSTED_OTHERS)


def moment() -> tuple[float, float, float]:
    """For `cores_of_others`: seconds on the clock, of computing on all cores together, and of this process on all cores, with those that it started
    and that have ended."""
    cores = psutil.cpu_times()
    idle = cores.idle + getattr(cores, "iowait", 0.0)
    guests = getattr(cores, "guest", 0.0) + getattr(cores, "guest_nice", 0.0)  # counted in user and nice too
    ended = os.times()
    own = time.process_time() + ended.children_user + ended.children_system
    return time.monotonic(), sum(cores) - idle - guests, own


def cores_of_others(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    """How many cores other processes kept busy between two moments."""
    passed, busy, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (busy - own) / passed) if passed > 0 else 0.0
