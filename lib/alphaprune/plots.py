"""The figures. They take tables and know nothing of training.

Every function returns a matplotlib Figure; `save` writes it as PNG and SVG.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from alphaprune.course import FOLD_NOW, FOLD_NOW_AT_END
from alphaprune.storage import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

STYLE = sns.axes_style("whitegrid") | sns.plotting_context("paper", font_scale=1.15) | {
    "svg.hashsalt": "alphaprune",  # the same figure gives the same file
    "grid.color": "#e3e3e3",
    "axes.edgecolor": "#777777",
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "*", "X")
LIGHT, DARK = "#b9c0c8", "#3d4650"  # ends of the greys of stages to which the report gives no colour


def stage_curves(curves: pd.DataFrame, title: str, fold_now: bool = False) -> Figure:
    """Training and validation accuracy over steps, one curve a stage.

    The scale goes from 0 to 100 %, so that figures can be laid side by side.

    Args:
        curves: columns experiment, stage, alpha, lr, color (None: a grey, or where no stage has one, shades from dark to light), start (step at which the stage's curve begins),
            step, split, metric, value (a share of 1), as `Experiment.curves` gives them: stages of other
            experiments first.
        title: above the figure.
        fold_now: draw a third panel, the accuracy if the network were folded: a line where measured, a large marker at the end of each stage.
    """
    stages = list(curves.groupby(["experiment", "stage"], sort=False))
    own_experiment = curves["experiment"].iloc[-1]
    uncolored = [key for key, own in stages if pd.isna(own["color"].iloc[0])]
    # Where the report gives colours, the rest is in the background; where it gives none, they tell the stages apart.
    shades = sns.blend_palette([LIGHT, DARK], max(len(uncolored), 1))
    if len(uncolored) == len(stages):
        shades = sns.color_palette("viridis", len(stages))
    greys = dict(zip(uncolored, shades, strict=False))
    # Greys look alike, so each has a marker of its own.
    markers = {
        key: MARKERS[i % len(MARKERS)] for i, key in enumerate(uncolored) if len(uncolored) < len(stages)
    }
    with matplotlib.rc_context(STYLE):
        panels = 3 if fold_now else 2
        height = 3.6 + 0.17 * ((len(stages) + fold_now + 3) // 4)
        figure = Figure(figsize=(3.9 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, sharex=True, sharey=True)
        for (experiment, stage), own in stages:
            first = own.iloc[0]
            color = greys.get((experiment, stage), first["color"])
            label = (
                f"lr {first['lr']:g}"
                if pd.isna(first["alpha"])
                else f"α {own['alpha'].iloc[-1]:g}, lr {first['lr']:g}"
            )
            if experiment != own_experiment:
                label = f"before: {label}"
            width = 1.2 if (experiment, stage) in greys else 2.0
            marker = markers.get((experiment, stage), "o")
            own = own.assign(x=own["start"] + own["step"], percent=100 * own["value"])
            for ax, split in zip(axes, ("train", "val"), strict=False):
                points = own[(own["split"] == split) & (own["metric"] == "accuracy")]
                drawn = {"marker": marker, "ms": 3 if marker == "o" else 5} if split == "val" else {}
                ax.plot(points["x"], points["percent"], color=color, lw=width, label=label, **drawn)
            if fold_now:
                points = own[own["metric"].isin(FOLD_NOW)]
                axes[2].plot(points["x"], points["percent"], color=color, lw=width)
                points = own[own["metric"] == FOLD_NOW_AT_END]
                axes[2].plot(points["x"], points["percent"], color=color, marker=marker, ms=7, ls="")
        if fold_now:
            axes[2].set_title("Validation, if folded now")
        axes[0].set_title("Training")
        axes[1].set_title("Validation")
        axes[0].set_ylabel("accuracy, %")
        for ax in axes:
            ax.set_xlabel("training step")
            ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            _percent(ax)
        handles, labels = axes[1].get_legend_handles_labels()
        if fold_now:
            handles += axes[2].plot([], [], color="black", marker="o", ms=7, ls="")
            labels += ["best weights of a stage, folded"]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
        figure.suptitle(title)
    return figure


def overview(summaries: pd.DataFrame, reported: pd.DataFrame) -> Figure:
    """Validation accuracy against alpha for all experiments, the report's values as markers.

    Args:
        summaries: columns experiment, alpha, val_accuracy (a share of 1), in the order of training.
        reported: columns experiment, alpha, report (percent).
    """
    names = list(dict.fromkeys(summaries["experiment"]))
    palette = dict(zip(names, sns.color_palette("colorblind", len(names)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 4.8), layout="constrained")
        ax = figure.subplots()
        for name in names:
            own = summaries[summaries["experiment"] == name]
            marker = MARKERS[names.index(name) % len(MARKERS)]
            best = own.groupby("alpha")["val_accuracy"].max().sort_index(ascending=False)
            ax.plot(best.index, 100 * best, color=palette[name], lw=1.4, zorder=2)
            ax.scatter(
                own["alpha"], 100 * own["val_accuracy"], edgecolor=palette[name], facecolor="none", marker=marker,
                s=40, lw=1.4, label=_in_words(name), zorder=3,
            )  # fmt: skip
            theirs = reported[reported["experiment"] == name]
            ax.scatter(
                theirs["alpha"],
                theirs["report"],
                color=palette[name],
                marker="X",
                s=95,
                edgecolor="black",
                lw=0.9,
                zorder=4,
            )
        ax.scatter([], [], color="white", marker="X", s=95, edgecolor="black", label="the report's value")
        ax.set_xscale("symlog", linthresh=0.0025, linscale=0.5)
        ticks = [1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.0025, 0]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlim(1.0, -0.0006)
        ax.set_xlabel("α, falling to the right")
        ax.set_ylabel("validation accuracy, %")
        ax.set_title("Accuracy against α: every stage of every experiment; lines join the best at each α")
        _percent(ax)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def _in_words(experiment: str) -> str:
    """Such as `Figure 1` for fig1, `section 2.1` for section21, `week before` for week_before."""
    name = re.sub(r"^fig(\d)$", r"Figure \1", experiment)
    return re.sub(r"^section(\d)(\d)$", r"section \1.\2", name).replace("_", " ")


def _percent(ax: Axes) -> None:
    ax.set_ylim(0, 101)  # a curve at 100 is seen whole
    ax.set_yticks(range(0, 101, 10))


def prune_bars(table: pd.DataFrame) -> Figure:
    """Accuracy, parameters and cost of original and pruned networks, side by side, for the columns that are there.

    Args:
        table: a row a network, "original" in the names of those; columns network, test_accuracy (a share of 1), parameters, multiply_adds.
    """
    with matplotlib.rc_context(STYLE):
        columns = (
            ("test_accuracy", 100, "test accuracy, %"),
            ("val_accuracy", 100, "validation accuracy, %"),
            ("parameters", 1e-6, "parameters, millions"),
            ("multiply_adds", 1e-6, "multiply-adds an image, millions"),
            ("milliseconds", 1, "milliseconds a batch"),
        )
        columns = [c for c in columns if c[0] in table]
        if "test_accuracy" in table:  # the final word; then validation is not drawn
            columns = [c for c in columns if c[0] != "val_accuracy"]
        figure = Figure(figsize=(max(8.6, 3.2 * len(columns), 3.4 * len(table)), 2.9), layout="constrained")
        for ax, (column, factor, title) in zip(figure.subplots(1, len(columns)), columns, strict=True):
            colors = [LIGHT if "original" in name else "royalblue" for name in table["network"]]
            bars = ax.bar(table["network"], factor * table[column], color=colors, width=0.6)
            ax.bar_label(bars, fmt="{:.3g}", padding=2)
            ax.margins(y=0.15)
            ax.grid(False, axis="x")
            ax.set_title(title, fontsize="medium")
    return figure


def picture_grid(images: Tensor, titles: list[str], columns: int = 10) -> Figure:
    """Pictures in rows, each with its title.

    Args:
        images: (N, 3, H, W) uint8.
        titles: one a picture.
        columns: pictures a row.
    """
    rows = -(-len(images) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.95 * columns, 1.15 * rows), layout="constrained")
        for ax, image, title in zip(figure.subplots(rows, columns).flat, images, titles, strict=False):
            ax.imshow(image.permute(1, 2, 0).numpy())
            ax.set_title(title, fontsize="x-small", pad=2)
        for ax in figure.axes:
            ax.axis("off")
    return figure


@dataclass(frozen=True)
class Picture:
    """A saved figure that a notebook shows, with its description as the text that stands for it."""

    path: Path
    description: str

    def _repr_html_(self) -> str:
        content = base64.b64encode(self.path.read_bytes()).decode()
        return f'<img alt="{html.escape(self.description)}" style="max-width: 100%" src="data:image/png;base64,{content}">'


def save(figure: Figure, path: Path, description: str, sources: Any) -> Picture:
    """Write `<path>.png` and `<path>.svg` with description and sources inside, and the description as `<path>.txt`.

    Args:
        figure: to be saved.
        path: of the files, without ending.
        description: what the figure shows, for those who do not see it.
        sources: what it was made from, any value for JSON; `python -m alphaprune.provenance` reads what
            `Experiment.provenance` and its like give. Without a time of day, so that the same figure gives the same file.

    Returns:
        The picture, for a notebook to show.
    """
    inside = {
        "Description": description,
        "Source": json.dumps(sources, sort_keys=True, separators=(",", ":"), allow_nan=False),
    }
    for ending, metadata in (
        ("png", inside),
        ("svg", {**inside, "Date": None}),
    ):
        content = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            figure.savefig(content, format=ending, dpi=160, metadata=metadata)
        write_bytes(path.with_name(f"{path.name}.{ending}"), content.getvalue())
    write_bytes(path.with_name(f"{path.name}.txt"), f"{description}\n".encode())
    return load(path)


def is_saved(path: Path) -> bool:
    """Whether `load` would find a picture there."""
    return all(path.with_name(f"{path.name}.{ending}").is_file() for ending in ("png", "txt"))


def load(path: Path) -> Picture:
    """A picture that `save` wrote."""
    return Picture(path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.txt").read_text().strip())
