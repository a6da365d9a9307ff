"""How fast it is: ratios of what took turns in one run, and the targets that the project keeps to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn

from alphaprune.allocator import keep_freed_memory
from alphaprune.data import Split, batches
from alphaprune.deployment import deployment
from alphaprune.fold import fold
from alphaprune.models import vgg16
from alphaprune.narrowing import folded_at_once, torch_pruning
from alphaprune.parallel import ParallelModel
from alphaprune.passes import training_step
from alphaprune.timing import alternate, torch_threads

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
    """

    quick_width: float = 0.25
    full_width: float = 1.0
    batch: int = 128
    resnet_batch: int = 16
    resnet_side: int = 224
    fit_images: int = 2000
    threads: int = 2
    seconds: float = 40.0


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
    rows.append(
        _row(
            f"{name}, batch {len(x)}: folded against Torch-Pruning, both optimised",
            ours["faster"] / theirs["faster"],
            "times as fast",
            Target(),
            ours,
        )
    )
    return rows


def once(width: float, images: int, threads: int) -> list[dict[str, Any]]:
    """What is done once for a network: seconds for the start by least squares, and for folding."""
    seen = torch.randn(images, 3, 32, 32)
    with torch_threads(threads):
        started = time.monotonic()
        model = ParallelModel(vgg16(width), KEEP_RATIO, seen[:2], init="least_squares", images=seen)
        fitted = time.monotonic()
        model.alpha = 0.0
        fold(model)
        folded = time.monotonic()
    shared = {"threads": threads}
    network = f"VGG-16 of width {width:g}"
    return [
        {"what": f"start by least squares, {network}, {images} images", "value": fitted - started, "unit": "seconds"} | _target(FIT_TARGET, fitted - started) | shared,
        {"what": f"fold with its certificate, {network}", "value": folded - fitted, "unit": "seconds"} | _target(Target(), 0) | shared,
    ]  # fmt: skip


def measure(sizes: Sizes = Sizes(), say: Callable[[str], None] = print) -> pd.DataFrame:
    """Everything, one row a figure.

    Returns:
        Columns `what`; `milliseconds` a call, where it was called more than once; `value` and its `unit`; `target`, a bound in words, and whether it
        `holds`, None where there is none; `spread`, `others`, `trusted` and `threads` as of `timing.alternate`.
    """
    keep_freed_memory()
    torch.manual_seed(0)
    s = sizes
    groups: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
        "training, one thread": lambda: training_steps(s.quick_width, s.batch, 1, s.seconds),
        f"training, {s.threads} threads": lambda: training_steps(s.full_width, s.batch, s.threads, s.seconds),
        "data path": lambda: data_path(s.quick_width, s.batch, s.seconds / 4),
        "VGG-16": lambda: inference(f"VGG-16 of width {s.full_width:g}", vgg16(s.full_width), torch.randn(s.batch, 3, 32, 32), s.threads, s.seconds),
        "ResNet-18": lambda: inference("ResNet-18", torchvision.models.resnet18(), torch.randn(s.resnet_batch, 3, s.resnet_side, s.resnet_side), s.threads, s.seconds),
        "once": lambda: once(s.full_width, s.fit_images, s.threads),
    }  # fmt: skip
    rows = []
    for name, group in groups.items():
        found = group()
        rows += found
        say(f"[{name}]")
        for row in found:
            say(f"  {as_line(row)}")
    return pd.DataFrame(rows).reindex(columns=COLUMNS)


def as_line(row: Mapping[str, Any]) -> str:
    """A figure for people: what, how much, and whether that keeps to its target and is to be trusted."""
    line = f"{row['what']}: {row['value']:.2f} {row['unit']}"
    if row["target"]:
        line += f" (target: {row['target']}{'' if row['holds'] else '; FALLS SHORT'})"
    if row.get("trusted") is False:
        line += f"; not to be trusted: spread {row['spread']:.0%}, others kept {row['others']:.2f} cores busy"
    return line


def as_table(table: pd.DataFrame) -> str:
    """The figures as a table in Markdown."""
    lines = [
        "| what | threads | ms | value | | target | | spread |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table.to_dict("records"):
        verdict = {True: "holds", False: "**falls short**"}.get(row["holds"], "")
        timed = ["" if pd.isna(row[k]) else form.format(row[k]) for k, form in FORMS.items()]
        busy = "; not to be trusted, busy machine" if row["trusted"] is False else ""
        cells = [
            row["what"],
            *timed[:2],
            f"{row['value']:.2f}",
            row["unit"],
            row["target"],
            verdict,
            timed[2] + busy,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def _in_order(network: nn.Module) -> nn.Module:
    return network.to(memory_format=torch.channels_last)
