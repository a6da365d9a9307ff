"""How fast one device is, most of all a GPU: whole epochs of training, a step as it is and compiled, and what is deployed."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alphaprune.benchmark_rows import (
    KEEP_RATIO,
    SIZES,
    Sizes,
    Target,
    all_rows,
    in_order,
    target_columns,
    timed_row,
)
from alphaprune.captured import Gradients
from alphaprune.data import Split, batches
from alphaprune.errors import UsageError
from alphaprune.footprint import footprint
from alphaprune.measure import multiply_adds
from alphaprune.models import vgg16
from alphaprune.narrowing import folded_at_once
from alphaprune.parallel import ParallelModel
from alphaprune.passes import Replayed, forward
from alphaprune.recipe import Recipe
from alphaprune.timing import (
    alternate,
    clock,
    cores_of_others,
    moment,
    trusted,
)
from alphaprune.train import Accelerator, accelerator_for_this_machine, fit

GPU_DATA_TARGET = Target(at_most=2)  # % of a step at alpha 1
# FLOP/s of bf16 without sparsity, by the name that torch has for a card. Source: NVIDIA's figures as quoted by glennklockwood.com/garden/processors/h100
# (989.4 for H100 SXM and H200) and hmc-tech.com/gpu/nvidia-h100-vs-nvidia-a100-sxm-40gb (311.9 for A100).
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
MATRIX_UNIT = 8  # numbers of 16 bits that a GPU's matrix units read at once
GRAPH = "CUDA graph"
FLOPS_A_MULTIPLY_ADD = 2
PASSES = 3  # forward, and backward twice that: by weights and by what they read
EPOCHS = 5  # timed, behind one that is not


def training_on(
    device: str, width: float, batch: int, images: int, seconds: float, peak: float | None
) -> list[dict[str, Any]]:
    """Training of a VGG-16 by `fit` on one device: an epoch with branches and folded, and what the data path takes of it.

    An epoch is timed from its first random number to the end of its steps, with one batch of validation images behind it, and without saving. The
    share of the peak counts multiply-adds of the forward pass, twice as many backward, and two operations each. On a GPU the steps are replayed
    from a CUDA graph, as `fit` does.

    Args:
        device: "cuda", or "cpu" in float32.
        width, batch, images: of the VGG-16; images a step and an epoch, held on the device.
        seconds: of timing the data path.
        peak: operations a second that the device does at most; None where that is not known.
    """
    accelerator = accelerator_for_this_machine(cpu=device == "cpu")
    x = torch.randn(batch, 3, 32, 32)
    pixels = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    train = Split(pixels, torch.randint(10, (images,))).to(device)
    what = f"{device}, VGG-16 of width {width:g}, batch {batch}"
    shared = target_columns(Target(), 0) | {"threads": torch.get_num_threads()}
    of_peak = f"% of {peak / 1e12:.4g} TFLOP/s" if peak else "% of what this device does at most"
    rows: list[dict[str, Any]] = []
    an_epoch: dict[str, float] = {}
    for name, network in _with_branches_and_folded(width, x).items():
        operations = FLOPS_A_MULTIPLY_ADD * PASSES * multiply_adds(network, x) / batch
        before = moment()
        low, an_epoch[name], high = np.quantile(
            _epochs(network, train, batch, accelerator), [0.25, 0.5, 0.75]
        )
        spread, others = (high - low) / an_epoch[name], cores_of_others(before, moment())
        rate = images // batch * batch / an_epoch[name]
        share = 100 * operations * rate / peak if peak else math.nan
        busy = {"others": others, "trusted": trusted(spread, others, shared["threads"])}
        timed = shared | {"spread": spread} | busy
        rows += [
            {"what": f"{what}: {name}, an epoch of {images:,} images", "value": an_epoch[name], "unit": "seconds"} | timed,
            {"what": f"{what}: {name}, training", "value": rate, "unit": "images a second"} | timed,
            {"what": f"{what}: {name}, share of the peak", "value": share, "unit": of_peak} | timed,
        ]  # fmt: skip

    def feed() -> None:
        for _ in batches(train, batch, torch.Generator().manual_seed(0)):
            pass

    fed = alternate({"data": feed}, seconds).loc["data"]
    # At most: alone it waits for the program that starts it, which in training is ahead.
    share = 100 * fed["median"] / an_epoch["alpha 1"]
    rows.append(timed_row(f"{what}: data path, of a step at alpha 1", share, "%", GPU_DATA_TARGET, fed))
    return rows


def _with_branches_and_folded(width: float, x: Tensor) -> dict[str, nn.Module]:
    networks: dict[str, nn.Module] = {"plain": vgg16(width)}
    for alpha in (1.0, 0.5, 0.0):
        networks[f"alpha {alpha:g}"] = model = ParallelModel(vgg16(width), KEEP_RATIO, x[:2])
        model.alpha = alpha
    for name, multiple in (("folded", 1), (f"folded, multiples of {MATRIX_UNIT}", MATRIX_UNIT)):
        networks[name] = folded_at_once(vgg16(width), KEEP_RATIO, x[:1], multiple)
    return networks


def _epochs(network: nn.Module, train: Split, batch: int, accelerator: Accelerator) -> list[float]:
    """Seconds of each epoch of `fit` but the first, in which memory is asked for and kernels are chosen."""
    taken: list[float] = []
    begun = 0.0

    def ended(epoch: int, accuracy: float) -> dict[str, float]:
        if epoch > 1:
            taken.append(clock() - begun)
        return {}

    def begins(_: Any) -> None:
        nonlocal begun
        begun = clock()

    recipe = Recipe(1e-3, "one_cycle", max_epochs=1 + EPOCHS, batch_size=batch)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        checkpoint = Path(folder) / "state.safetensors"
        fit(network, train, train.first(batch), recipe, "benchmark", checkpoint, after_epoch=begins, measure=ended, accelerator=accelerator)  # fmt: skip
    return taken


def compiled_on(
    device: str, what: str, network: nn.Module, x: Tensor, seconds: float, compiler: bool = True
) -> list[dict[str, Any]]:
    """A training step on one device as it is, through torch.compile, and on a GPU replayed from a CUDA graph, in turns. What does not work here says why.

    A network with branches torch.compile takes in pieces, and the last of many layers not at all (its `recompile_limit`).

    Args:
        device: "cuda", or "cpu" in float32, with the threads that torch has.
        what: the network's name.
        network: with two classes or more. It is not changed.
        x: images, (N, C, H, W).
        seconds: of timing.
        compiler: whether to try torch.compile, which takes a minute of its own.
    """
    # accelerate knows one device a process, which on a GPU is that.
    accelerator = accelerator_for_this_machine() if device == "cuda" else None
    x, labels = in_order(x.to(device)), torch.zeros(len(x), dtype=torch.int64, device=device)
    what = f"{device}, {what}, batch {len(x)}: a step"
    ways: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
        "eager": lambda own: own,
        "torch.compile": torch.compile,
    }
    if device == "cuda":
        ways[GRAPH] = ways["eager"]
    if not compiler:
        del ways["torch.compile"]
    steps: dict[str, Callable[[], None]] = {}
    rows = []
    for way, prepared in ways.items():
        own = in_order(copy.deepcopy(network).to(device)).train()
        try:
            step = _step(own, prepared(own), x, labels, accelerator, way == GRAPH)
            with _without_remarks():
                step()
        except Exception as e:  # such as no compiler
            if way == "eager":
                raise
            why = f"since it does not work here ({' '.join(str(e).split())[:120]})"
            rows.append(
                {"what": f"{what}, {way}", "value": math.nan, "unit": why} | target_columns(Target(), 0)
            )
        else:
            steps[way] = step
    times = alternate(steps, seconds)
    return [
        timed_row(f"{what}, {t.Index}", t.ratio, "times as fast as eager", Target(), t)
        | {"milliseconds": 1000 * t.median}
        for t in times.itertuples()
    ] + rows


def deployed_on(device: str, width: float, batch: int, seconds: float) -> list[dict[str, Any]]:
    """A VGG-16 and what it folds to in eval mode on one device, in float32 and in bfloat16: time and most memory of one image and of a batch.

    Args:
        device: "cuda" or "cpu".
        width, batch: of the VGG-16; images at once.
        seconds: of timing, for each precision and number of images.
    """
    networks, image = _original_and_folded(width), torch.randn(1, 3, 32, 32)
    rows = []
    for precision in (torch.float32, torch.bfloat16):
        own = {name: copy.deepcopy(n).to(precision) for name, n in networks.items()}
        table = footprint({"VGG-16": own}, image.to(precision), (1, batch), seconds, device=device)
        for t in table.itertuples():
            what = f"{device}, VGG-16 of width {width:g}, {str(precision).removeprefix('torch.')}, batch {t.batch}: {t.network}"
            ratio = timed_row(f"{what}, inference", t.faster, "times as fast as the original", Target(), t)
            held = {"value": t.memory_peak, "unit": "MiB at most", "threads": t.threads}
            rows += [
                ratio | {"milliseconds": t.milliseconds},
                {"what": f"{what}, memory"} | held | target_columns(Target(), 0),
            ]
    return rows


def replayed_on(width: float, batches: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """The same two networks on a GPU, each as it is and from a CUDA graph, in turns: time to the answer alone, in channels_last order.

    Small batches are done before Python has named the next kernel, so without a graph both networks take as long.

    Args:
        width, batches: of the VGG-16; numbers of images at once.
        seconds: of timing, for each precision and number of images.
    """
    networks = {name: in_order(n.to("cuda")) for name, n in _original_and_folded(width).items()}
    rows = []
    for precision in (torch.float32, torch.bfloat16):
        own = {name: copy.deepcopy(n).to(precision) for name, n in networks.items()}
        for batch in batches:
            x = in_order(torch.randn(batch, 3, 32, 32, device="cuda", dtype=precision))
            calls = {name: _awaited(forward(n, x)) for name, n in own.items()}
            calls |= {f"{name}, {GRAPH}": _awaited(Replayed(n, x)) for name, n in own.items()}
            what = f"cuda, VGG-16 of width {width:g}, {str(precision).removeprefix('torch.')}, batch {batch}"
            rows += [
                timed_row(
                    f"{what}: {t.Index}, in turns", t.ratio, "times as fast as the original", Target(), t
                )
                | {"milliseconds": 1000 * t.median}
                for t in alternate(calls, seconds).itertuples()
            ]
    return rows


def _awaited(call: Callable[[], Any]) -> Callable[[], None]:
    """With the wait for the GPU's answer, which whoever asks for one batch has."""

    def answered() -> None:
        call()
        torch.cuda.synchronize()

    return answered


def _original_and_folded(width: float) -> dict[str, nn.Module]:
    original = vgg16(width).eval()
    folded = folded_at_once(original, KEEP_RATIO, torch.randn(1, 3, 32, 32), MATRIX_UNIT)
    return {"original": original, f"folded, multiples of {MATRIX_UNIT}": folded}


@contextmanager
def _without_remarks() -> Iterator[None]:
    """A dozen lines on each piece that torch.compile leaves as it is."""
    logger = logging.getLogger("torch._dynamo")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _step(
    network: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    labels: Tensor,
    accelerator: Accelerator | None,
    capture: bool,
) -> Callable[[], None]:
    trained = list(network.parameters())
    optimiser = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)

    def loss_of(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = forward(images)
        return F.cross_entropy(logits, labels), logits

    gradients = Gradients(loss_of, network, trained, accelerator, capture) if accelerator else None

    def step() -> None:
        if gradients:
            gradients(x, labels, alike=True)
            if capture and not gradients.recorded:
                raise RuntimeError("steps cannot be recorded")
        else:
            optimiser.zero_grad()
            loss_of(x, labels)[0].backward()
        optimiser.step()

    return step


def measure_gpu(sizes: Sizes = SIZES, say: Callable[[str], None] = print) -> pd.DataFrame:
    """What is measured on a GPU, in the form of `measure`: whole epochs, what is deployed, and a training step as it is, from a CUDA graph, and compiled.

    Raises:
        UsageError: if there is none.
    """
    if not torch.cuda.is_available():
        raise UsageError("torch sees no GPU here; run this on a machine with one, and a torch built for it")
    torch.manual_seed(0)
    s = sizes
    peak = PEAKS.get(torch.cuda.get_device_name())
    x, of_width = torch.randn(s.batch, 3, 32, 32), f"VGG-16 of width {s.full_width:g}"
    groups: dict[str, Callable[[], list[dict[str, Any]]]] = {
        f"batch {batch}": partial(
            training_on, "cuda", s.full_width, batch, s.epoch_images, s.seconds / 50, peak
        )
        for batch in (s.batch, 4 * s.batch)
    }
    groups["deployed"] = partial(deployed_on, "cuda", s.full_width, s.batch, s.seconds / 50)
    groups["deployed, replayed"] = partial(
        replayed_on, s.full_width, (1, s.batch, 8 * s.batch), s.seconds / 50
    )
    for name, network in _with_branches_and_folded(s.full_width, x).items():
        compiler = name in ("plain", "folded")  # of branches it leaves most as it is
        groups[name] = partial(
            compiled_on, "cuda", f"{of_width}, {name}", network, x, s.seconds / 25, compiler
        )
    return all_rows(groups, say)
