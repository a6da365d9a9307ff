"""How fast it is: ratios of what took turns in one run, and the targets that the project keeps to; on a GPU also whole epochs."""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from alphaprune.allocator import keep_freed_memory
from alphaprune.captured import Gradients
from alphaprune.data import Split, batches
from alphaprune.deployment import deployment
from alphaprune.errors import UsageError
from alphaprune.fold import fold
from alphaprune.footprint import footprint
from alphaprune.measure import multiply_adds
from alphaprune.models import vgg16
from alphaprune.narrowing import folded_at_once, torch_pruning
from alphaprune.parallel import ParallelModel
from alphaprune.passes import training_step
from alphaprune.recipe import Recipe
from alphaprune.timing import (
    TRUSTED_SPREAD,
    alternate,
    clock,
    cores_of_others,
    moment,
    torch_threads,
    trusted,
)
from alphaprune.train import Accelerator, accelerator_for_this_machine, fit

KEEP_RATIO = 0.34375
REGISTER = 16  # numbers of float32 in the widest registers of a CPU
ROUNDED = f"folded, multiples of {REGISTER}"
COLUMNS = [
    "what", "milliseconds", "value", "unit", "target", "holds", "spread", "others", "trusted", "threads",
]  # fmt: skip
FORMS = {"threads": "{:.0f}", "milliseconds": "{:.1f}", "spread": "{:.0%}"}


@dataclass(frozen=True)
class Sizes:
    """What is measured; smaller for tests.

    Attributes:
        quick_width, full_width: of the VGG-16 that trains on one thread, as in `quick`, and of the one that trains and runs on `threads`.
        batch: images a step.
        resnet_batch, resnet_side: images at once for ResNet-18, and their side in pixels.
        fit_images: for the least-squares start.
        threads: for what runs on more than one.
        seconds: of timing, for each group of alternatives.
        epoch_images: of an epoch on a GPU: as many as CIFAR-10 has for training.
    """

    quick_width: float = 0.25
    full_width: float = 1.0
    batch: int = 128
    resnet_batch: int = 16
    resnet_side: int = 224
    fit_images: int = 2000
    threads: int = 2
    seconds: float = 40.0
    epoch_images: int = 45_000


@dataclass(frozen=True)
class Target:
    """A bound on a ratio: `at_most` or `at_least`, None where it has none."""

    at_most: float | None = None
    at_least: float | None = None

    def holds(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (
            self.at_least is None or value >= self.at_least
        )

    def __str__(self) -> str:
        bounds = [("at most", self.at_most), ("at least", self.at_least)]
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


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


def training_steps(width: float, batch: int, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Training steps of a VGG-16 with branches, and folded, as shares of the plain network's."""
    x = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    steps = {"plain": training_step(_in_order(vgg16(width)), x)}
    for alpha in (1.0, 0.5, 0.0):
        for frozen in (False, True):
            model = ParallelModel(vgg16(width), KEEP_RATIO, x[:2])
            model.alpha, model.train_wide = alpha, not frozen
            if alpha < 1 or not frozen:
                name = f"alpha {alpha:g}{', wide weights frozen' if frozen else ''}"
                steps[name] = training_step(_in_order(model), x)
    steps["folded"] = training_step(_in_order(folded_at_once(vgg16(width), KEEP_RATIO, x[:1])), x)
    what = f"training step, VGG-16 of width {width:g}, batch {batch}"
    times = alternate(steps, seconds, threads)
    return [
        _row(f"{what}: {name}", 1 / t.ratio, "of the plain network's", STEP_TARGETS.get(name, Target()), t)
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
    step = training_step(_in_order(vgg16(width)), x)

    def feed() -> None:
        for _ in batches(split, batch, torch.Generator().manual_seed(0)):
            pass

    times = alternate({"step": lambda: [step() for _ in range(steps)], "data": feed}, seconds, 1)
    row = times.loc["data"]
    return [
        _row(
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
        row = _row(what, t.faster, f"times as fast; multiply-adds predict {t.predicted:.2f}", target, t)
        rows.append(row | {"milliseconds": t.milliseconds})
    ours, theirs = (
        times[(times["network"] == n) & (times["way"] == "optimised")].iloc[0]
        for n in ("folded", "Torch-Pruning")
    )
    what = f"{name}, batch {len(x)}: folded against Torch-Pruning, both optimised"
    both = _row(what, ours["faster"] / theirs["faster"], "times as fast", Target(), ours)
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
        _row(f"fold with its certificate, {network}", folding["median"], "seconds", Target(), folding),
    ]


def run_once(what: str, target: Target, before: tuple[float, float, float], threads: int) -> dict[str, Any]:
    """The row of what takes so long that it is run once: it has no spread, and is trusted where the machine was not busy.

    Args:
        what, target: of the row, in seconds.
        before: `timing.moment` as it began; it has ended now.
        threads: that it used.

    Returns:
        The row, with the columns of `measure` that are known.
    """
    after = moment()
    seconds, others = after[0] - before[0], cores_of_others(before, after)
    row = {"what": what, "value": seconds, "unit": "seconds"} | _target(target, seconds)
    return row | {"others": others, "trusted": trusted(0.0, others, threads), "threads": threads}


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
    shared = _target(Target(), 0) | {"threads": torch.get_num_threads()}
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
    rows.append(_row(f"{what}: data path, of a step at alpha 1", share, "%", GPU_DATA_TARGET, fed))
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

    def ended(epoch: int) -> dict[str, float]:
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
    x, labels = _in_order(x.to(device)), torch.zeros(len(x), dtype=torch.int64, device=device)
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
        own = _in_order(copy.deepcopy(network).to(device)).train()
        try:
            step = _step(own, prepared(own), x, labels, accelerator, way == GRAPH)
            with _without_remarks():
                step()
        except Exception as e:  # such as no compiler
            if way == "eager":
                raise
            why = f"since it does not work here ({' '.join(str(e).split())[:120]})"
            rows.append({"what": f"{what}, {way}", "value": math.nan, "unit": why} | _target(Target(), 0))
        else:
            steps[way] = step
    times = alternate(steps, seconds)
    return [
        _row(f"{what}, {t.Index}", t.ratio, "times as fast as eager", Target(), t)
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
    original = vgg16(width).eval()
    image = torch.randn(1, 3, 32, 32)
    folded = folded_at_once(original, KEEP_RATIO, image, MATRIX_UNIT)
    rows = []
    for precision in (torch.float32, torch.bfloat16):
        networks = {"original": original, f"folded, multiples of {MATRIX_UNIT}": folded}
        own = {name: copy.deepcopy(n).to(precision) for name, n in networks.items()}
        table = footprint({"VGG-16": own}, image.to(precision), (1, batch), seconds, device=device)
        for t in table.itertuples():
            what = f"{device}, VGG-16 of width {width:g}, {str(precision).removeprefix('torch.')}, batch {t.batch}: {t.network}"
            ratio = _row(f"{what}, inference", t.faster, "times as fast as the original", Target(), t)
            held = {"value": t.memory_peak, "unit": "MiB at most", "threads": t.threads}
            rows += [
                ratio | {"milliseconds": t.milliseconds},
                {"what": f"{what}, memory"} | held | _target(Target(), 0),
            ]
    return rows


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


def _on_one_thread(group: Callable[..., list[dict[str, Any]]], *arguments: Any) -> list[dict[str, Any]]:
    """As `quick` trains."""
    with torch_threads(1):
        return group(*arguments)


def measure(sizes: Sizes = Sizes(), say: Callable[[str], None] = print) -> pd.DataFrame:
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
        f"training, {s.threads} threads": lambda: training_steps(s.full_width, s.batch, s.threads, s.seconds),
        "data path": lambda: data_path(s.quick_width, s.batch, s.seconds / 4),
        "VGG-16": lambda: inference(f"VGG-16 of width {s.full_width:g}", vgg16(s.full_width), torch.randn(s.batch, 3, 32, 32), s.threads, s.seconds),
        "ResNet-18": lambda: inference("ResNet-18", torchvision.models.resnet18(), torch.randn(s.resnet_batch, 3, s.resnet_side, s.resnet_side), s.threads, s.seconds),
        "once": lambda: once(s.full_width, s.fit_images, s.threads),
    }  # fmt: skip
    x, of_width = torch.randn(s.batch, 3, 32, 32), f"VGG-16 of width {s.quick_width:g}"
    blended = ParallelModel(vgg16(s.quick_width), KEEP_RATIO, x[:2])
    blended.alpha = 0.5
    for name, network in (("plain", vgg16(s.quick_width)), ("alpha 0.5", blended)):
        groups[f"compiled, {name}"] = partial(
            _on_one_thread, compiled_on, "cpu", f"{of_width}, {name}", network, x, s.seconds / 4
        )
    return _rows(groups, say)


def measure_gpu(sizes: Sizes = Sizes(), say: Callable[[str], None] = print) -> pd.DataFrame:
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
            training_on, "cuda", s.full_width, batch, s.epoch_images, s.seconds / 20, peak
        )
        for batch in (s.batch, 4 * s.batch)
    }
    groups["deployed"] = partial(deployed_on, "cuda", s.full_width, s.batch, s.seconds / 20)
    for name, network in _with_branches_and_folded(s.full_width, x).items():
        compiler = name in ("plain", "folded")  # of branches it leaves most as it is
        groups[name] = partial(
            compiled_on, "cuda", f"{of_width}, {name}", network, x, s.seconds / 10, compiler
        )
    return _rows(groups, say)


def _rows(
    groups: Mapping[str, Callable[[], list[dict[str, Any]]]], say: Callable[[str], None]
) -> pd.DataFrame:
    rows = []
    for name, group in groups.items():
        found = group()
        rows += found
        say(f"[{name}]")
        for row in found:
            say(f"  {as_line(row)}")
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def as_line(row: Mapping[str, Any]) -> str:
    """A figure for people: what, how much, whether that keeps to its target, how far runs differed, and whether it is to be trusted."""
    line = f"{row['what']}: {_number(row['value'])} {row['unit']}"
    if row["target"]:
        line += f" (target: {row['target']}{'' if row['holds'] else '; FALLS SHORT'})"
    timed = [] if math.isnan(row.get("spread", math.nan)) else [f"spread {row['spread']:.0%}"]
    if row.get("trusted") is False:
        timed.append(f"others kept {row['others']:.2f} cores busy")
        timed = [f"not to be trusted: {', '.join(timed)}"]
    return "; ".join([line, *timed])


def as_table(table: pd.DataFrame) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| what | threads | ms | value | | target | | spread |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table.to_dict("records"):
        verdict = {True: "holds", False: "**falls short**"}.get(row["holds"], "")
        timed = ["" if pd.isna(row[k]) else form.format(row[k]) for k, form in FORMS.items()]
        busy = f" not to be trusted{_busy(row)}" if row["trusted"] is False else ""
        cells = [
            row["what"],
            *timed[:2],
            _number(row["value"]),
            row["unit"],
            row["target"],
            verdict,
            timed[2] + busy,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _busy(row: Mapping[str, Any]) -> str:
    """What others computed, where the spread alone would not be too large."""
    wide = pd.notna(row["spread"]) and row["spread"] > TRUSTED_SPREAD
    return "" if wide else f", {row['others']:.2f} cores busy"


def _number(value: float) -> str:
    return "not known" if math.isnan(value) else f"{value:.2f}"


def _target(target: Target, value: float) -> dict[str, Any]:
    bounded = target != Target()
    return {"target": str(target) if bounded else "", "holds": target.holds(value) if bounded else None}


def _row(what: str, value: float, unit: str, target: Target, time: Any) -> dict[str, Any]:
    """A figure, with what `alternate` says of how it was timed."""
    timed = {
        k: getattr(time, k).item() if hasattr(getattr(time, k), "item") else getattr(time, k)
        for k in ("spread", "others", "trusted", "threads")
    }
    return {"what": what, "value": float(value), "unit": unit} | _target(target, value) | timed


def _in_order(what: Any) -> Any:
    """A network or images."""
    return what.to(memory_format=torch.channels_last)
