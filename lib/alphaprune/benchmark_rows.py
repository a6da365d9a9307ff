"""What is measured of speed, one figure a row: against its target, how far runs differed, and in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from alphaprune.timing import (
    TRUSTED_SPREAD,
    cores_of_others,
    moment,
    trusted,
)

KEEP_RATIO = 0.34375
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
    seconds: float = 100.0
    epoch_images: int = 45_000


SIZES = Sizes()


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
    row = {"what": what, "value": seconds, "unit": "seconds"} | target_columns(target, seconds)
    return row | {"others": others, "trusted": trusted(0.0, others, threads), "threads": threads}


def all_rows(
    groups: Mapping[str, Callable[[], list[dict[str, Any]]]], say: Callable[[str], None]
) -> pd.DataFrame:
    """All groups of figures measured, one after another, in the form of `COLUMNS`.

    Args:
        groups: by name what measures some.
        say: takes a line for each figure.
    """
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


def target_columns(target: Target, value: float) -> dict[str, Any]:
    """`target` and `holds` of a row."""
    bounded = target != Target()
    return {"target": str(target) if bounded else "", "holds": target.holds(value) if bounded else None}


def timed_row(what: str, value: float, unit: str, target: Target, time: Any) -> dict[str, Any]:
    """A figure, with what `alternate` says of how it was timed."""
    timed = {
        k: getattr(time, k).item() if hasattr(getattr(time, k), "item") else getattr(time, k)
        for k in ("spread", "others", "trusted", "threads")
    }
    return {"what": what, "value": float(value), "unit": unit} | target_columns(target, value) | timed


def in_order(what: Any) -> Any:
    """A network or images."""
    return what.to(memory_format=torch.channels_last)
