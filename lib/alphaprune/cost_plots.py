"""Figures of what networks cost. They take the tables of `footprint`, `deployment` and `growth` and measure nothing.

Grey is the original, blue what pruning left. A time that is not to be trusted is hatched, or hollow.
"""

from __future__ import annotations

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from alphaprune.plots import LIGHT, STYLE

ORIGINAL, PRUNED, MEMORY, PREDICTED = LIGHT, "royalblue", "darkorange", "black"
NOT_TRUSTED = "not to be trusted: the machine was busy with something else"


def time_and_memory(table: pd.DataFrame, title: str) -> Figure:
    """A row a network, a panel a quantity.

    Args:
        table: as of `footprint.footprint`.
        title: above the figure.
    """
    batches = sorted(table["batch"].unique())
    last = batches[-1]
    panels = [
        *((f"milliseconds a batch of {b}", b, "milliseconds", 1.0, "iqr") for b in batches),
        (f"images a second, batch {last}", last, "images_per_second", 1.0, None),
        (f"MiB on average, batch {last}", last, "memory_average", 1.0, None),
        (f"MiB at most, batch {last}", last, "memory_peak", 1.0, None),
        ("file, MB", last, "file", 1e-6, None),
        ("parameters, millions", last, "parameters", 1e-6, None),
        ("multiply-adds an image, millions", last, "multiply_adds", 1e-6, None),
    ]
    names = [f"{r.kind}, {r.network}" for r in table[table["batch"] == last].itertuples()]
    columns = 4
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12.5, 0.9 + rows * (0.9 + 0.32 * len(names))), layout="constrained")
        axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for ax, (label, batch, column, factor, spread) in zip(axes.flat, panels, strict=False):
            own = table[table["batch"] == batch]
            values = (factor * own[column]).tolist()
            trusted = own["trusted"].tolist() if column in ("milliseconds", "images_per_second") else None
            _bars(ax, values, own["network"].tolist(), trusted, None if spread is None else own[spread] / 2)
            ax.set_title(label, fontsize="medium")
            ax.set_yticks(range(len(names)), names)
            ax.invert_yaxis() if ax is axes[0, 0] else None
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        figure.suptitle(title)
        _legend(figure, "folded", bool(table["trusted"].all()))
    return figure


def _legend(figure: Figure, pruned: str, all_trusted: bool) -> None:
    handles = [Patch(color=ORIGINAL, label="original"), Patch(color=PRUNED, label=pruned)]
    if not all_trusted:
        handles.append(Patch(facecolor="#777777", edgecolor="white", hatch="////", label=NOT_TRUSTED))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def _bars(
    ax: Axes, values: list[float], networks: list[str], trusted: list[bool] | None, half: pd.Series | None
) -> None:
    colors = [ORIGINAL if n == "original" else PRUNED for n in networks]
    bars = ax.barh(
        range(len(values)), values, color=colors, height=0.62, xerr=half, error_kw={"lw": 1, "capsize": 2}
    )
    for bar, ok in zip(bars, trusted or [True] * len(values), strict=True):
        bar.set(hatch=None if ok else "////", edgecolor=bar.get_facecolor() if ok else "white", lw=0)
    ax.bar_label(bars, fmt="{:.3g}" if max(values) < 1000 else "{:,.0f}", padding=4, fontsize="small")
    ax.margins(x=0.28)
    ax.grid(False, axis="y")


def deployment(tables: dict[str, pd.DataFrame], title: str) -> Figure:
    """A panel a network, a row a way to run it: milliseconds of the original and of the pruned one.

    Args:
        tables: by the network's name, as of `deployment.deployment`, the original first in each.
        title: above the figure.
    """
    ways = list(dict.fromkeys(w for t in tables.values() for w in t["way"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * len(tables), 1.7 + 0.62 * len(ways)), layout="constrained")
        panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
        for ax, (name, table) in zip(panels, tables.items(), strict=True):
            original = table["network"].iloc[0]
            for shift, (network, own) in zip((-0.2, 0.2), table.groupby("network", sort=False), strict=True):
                own = own.set_index("way").reindex(ways)
                color = ORIGINAL if network == original else PRUNED
                places = [i + shift for i in range(len(ways))]
                bars = ax.barh(places, own["milliseconds"], height=0.36, color=color)
                for bar, ok in zip(bars, own["trusted"], strict=True):
                    bar.set(hatch=None if ok else "////", edgecolor="white", lw=0)
                said = [
                    f"{r.milliseconds:.3g} ms, ×{r.faster:.1f}"
                    + (f"  (×{r.faster_than_same:.1f} in the same way)" if network != original else "")
                    for r in own.itertuples()
                ]
                labels = ax.bar_label(bars, said, padding=4, fontsize="small")
                for label in labels:  # readable where the line of the prediction passes
                    label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
            first = table.iloc[0]
            predicted = table["predicted"].max()
            ax.axvline(first["milliseconds"] / predicted, color=PREDICTED, ls="--", lw=1)
            ax.annotate(f"multiply-adds predict ×{predicted:.1f}", (first["milliseconds"] / predicted, 1.0),
                        xycoords=("data", "axes fraction"), xytext=(4, 3), textcoords="offset points", fontsize="small")  # fmt: skip
            ax.set_yticks(range(len(ways)), ways)
            ax.set_xlim(0, 1.5 * table["milliseconds"].max())
            ax.set_xlabel("milliseconds a batch, median; × is against the original as it is")
            ax.set_title(f"{name}, batch {first['batch']}, threads {first['threads']}", pad=18)
            ax.grid(False, axis="y")
        panels[0].invert_yaxis()
        _legend(figure, "pruned", all(t["trusted"].all() for t in tables.values()))
        figure.suptitle(title)
    return figure


def growth(table: pd.DataFrame, title: str) -> Figure:
    """A panel an axis: time and memory of a training step, and the multiply-adds, as shares of those at the reference.

    Args:
        table: as of `growth.growth`.
        title: above the figure.
    """
    axes_names = list(dict.fromkeys(table["axis"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(axes_names), 4.3), layout="constrained")
        panels = figure.subplots(1, len(axes_names), squeeze=False)[0]
        for ax, axis in zip(panels, axes_names, strict=True):
            own = table[table["axis"] == axis].sort_values("at")
            plain = own[own["network"] == "plain"]
            ax.plot(plain["at"], plain["predicted"], color=PREDICTED, ls="--", lw=1.2, label="multiply-adds")
            _line(ax, plain, "time_share", PRUNED, "o", "time of a step")
            ax.plot(
                plain["at"],
                plain["memory_share"],
                color=MEMORY,
                marker="s",
                ms=5,
                lw=1.4,
                label="memory, peak",
            )
            beside = own[own["network"] != "plain"]
            if len(beside):
                _line(
                    ax, beside, "time_share", "crimson", "^", "time of a step with the branches, at alpha 0"
                )
            ax.set_xscale("log")
            ax.set_yscale("log")
            places = plain["at"].tolist()
            near = [b / a < 1.2 for a, b in zip(places, [*places[1:], float("inf")], strict=True)]
            ax.set_xticks(places, ["" if n else f"{a:.3g}" for a, n in zip(places, near, strict=True)])
            ax.minorticks_off()
            reference = plain.iloc[-1]
            ax.set_xlabel(axis)
            ax.set_title(
                f"1 is {reference['milliseconds']:,.0f} ms and {reference['memory']:,.0f} MiB, at {reference['at']:g}",
                fontsize="small",
            )
        panels[0].set_ylabel("share of the reference (logarithmic)")
        if not table["trusted"].all():
            panels[0].plot(
                [],
                [],
                ls="",
                color="#777777",
                marker="o",
                ms=5,
                markerfacecolor="white",
                label="hollow: not to be trusted",
            )
        named = {label: h for ax in panels for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(named.values(), named, loc="outside lower center", ncols=5, frameon=False)
        figure.suptitle(title)
    return figure


def _line(ax: Axes, own: pd.DataFrame, column: str, color: str, marker: str, label: str) -> None:
    ax.plot(own["at"], own[column], color=color, marker=marker, ms=5, lw=1.4, label=label)
    doubtful = own[~own["trusted"].astype(bool)]
    ax.plot(
        doubtful["at"], doubtful[column], ls="", color=color, marker=marker, ms=5, markerfacecolor="white"
    )
