"""How much memory a network takes while it runs, in a process of its own.

    average = 1/T * integral of m(t) dt        peak = max m(t)

with m the resident set of that process, read a thousand times a second, or on a GPU what torch's allocator has given out. Torch itself takes
memory before any network is there, a few hundred megabytes of a process: `baseline`, which is measured first, behind a small network that brings in
torch's code, and on a GPU what its libraries work in. A GPU is behind the program that gives it work, and memory is given out when the work is:
there the peak is exact, the average is over the time that passes in the program.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from alphaprune.errors import UsageError
from alphaprune.passes import forward, training_step
from alphaprune.trace import as_inputs

INTERVAL = 0.001  # seconds between two samples


@dataclass(frozen=True)
class Memory:
    """What a process held, in bytes.

    Attributes:
        baseline: before the network was there.
        average, peak: over the time it ran, baseline included.
        samples: how many were taken meanwhile.
        seconds: how long it ran, with at least one whole pass.
    """

    baseline: int
    average: int
    peak: int
    samples: int
    seconds: float


def memory(
    network: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    seconds: float = 1.0,
    threads: int | None = None,
    training: bool = False,
) -> Memory:
    """Run a network over and over in a fresh process and watch how much memory that process holds.

    Args:
        network: any module that can be pickled, whose class can be imported, on the example's device.
        example_input: a batch, (N, C, H, W), or a tuple of tensors. On a GPU, the GPU's memory is watched.
        seconds: how long to run it; once at least.
        threads: that torch may use; those it has if None.
        training: run training steps, with gradients and SGD with momentum, on the mean of all outputs; else eval mode without gradients.

    Raises:
        UsageError: if it does not get there, cannot run, or its process was ended, as by too little memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__name__]
    )  # the import is done once, in a process that never runs a network
    inputs = as_inputs(example_input)
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        path = Path(folder) / "network.pt"
        try:
            torch.save((network, inputs), path)
        except Exception as e:  # whatever pickle fails with
            raise UsageError(
                f"{type(network).__name__} cannot be handed to another process ({' '.join(str(e).split())[:160]}); "
                "define its class in a module"
            ) from None
        here, there = context.Pipe(duplex=False)
        arguments = (there, path, seconds, threads or torch.get_num_threads(), training, inputs[0].device)
        process = context.Process(target=_measure, args=arguments, daemon=True)
        process.start()
        there.close()
        try:
            found = here.recv()
        except EOFError:
            found = None
        process.join()
    if found is None:
        raise UsageError(
            f"the process that measured {type(network).__name__} was ended (exit code {process.exitcode}); give fewer images"
        )
    if isinstance(found, str):
        raise UsageError(
            f"{type(network).__name__} does not run in a process of its own: {found}; give it a batch it takes"
        )
    return found


def _measure(
    there: Connection, path: Path, seconds: float, threads: int, training: bool, device: torch.device
) -> None:
    torch.set_num_threads(threads)
    try:
        there.send(_watched(path, seconds, training, device))
    except Exception as e:
        there.send(" ".join(f"{type(e).__name__}: {e}".split())[:200])
    finally:
        there.close()


def _watched(path: Path, seconds: float, training: bool, device: torch.device) -> Memory:
    one_pass = training_step if training else forward
    one_pass(_small().to(device), torch.zeros(1, 3, 8, 8, device=device))()
    on_gpu = device.type == "cuda"
    process = psutil.Process()

    def read() -> int:
        return torch.cuda.memory_allocated(device) if on_gpu else process.memory_info().rss

    baseline = read()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    # Written by this very program a moment ago, in a folder that is its own.
    network, inputs = torch.load(path, weights_only=False)
    run = one_pass(network if training else network.eval(), *inputs)
    samples: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            samples.append(read())
            time.sleep(INTERVAL)

    watcher = threading.Thread(target=watch)
    started = time.monotonic()
    watcher.start()
    try:
        while not samples or time.monotonic() - started < seconds:
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
    finally:
        done.set()
        watcher.join()
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else max(samples)
    return Memory(baseline, int(np.mean(samples)), peak, len(samples), time.monotonic() - started)


def _small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 2)
    )
