"""Figures that compare methods. They take the tables of `comparison` and know nothing of training.

Blue is ours, orange Torch-Pruning, grey from scratch, red the report's recipe; filled is distilled, hollow is not.
"""

from __future__ import annotations

from textwrap import fill

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from alphaprune.course import FOLD_NOW, recorded_shares
from alphaprune.plots import STYLE

FAMILIES = {
    "alphaprune": "royalblue",
    "torch-pruning": "darkorange",
    "scratch": "#7a7a7a",
    "report": "crimson",
}
MOST_ALPHAS = 12  # written into a panel
SMALL = 70  # percent: where nothing is below, a panel begins there
WIDTHS = "widths by sensitivity"  # in a method's name, as distilled is
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _color(method: str) -> str:
    return next((c for family, c in FAMILIES.items() if method.startswith(family)), "black")


def _look(methods: list[str]) -> dict[str, dict[str, object]]:
    """Marker and colours by method: each method of a family has its own marker, with and without distillation the same."""
    markers: dict[tuple[str, str], str] = {}
    look = {}
    for method in methods:
        color, kind = _color(method), method.removesuffix(", distilled")
        own = [k for k in markers if k[0] == color]
        marker = markers.setdefault((color, kind), MARKERS[len(own) % len(MARKERS)])
        filled = kind != method
        look[method] = {"marker": marker, "color": color, "markerfacecolor": color if filled else "white"}
    return look


def ranking(summary: pd.DataFrame, title: str) -> Figure:
    """A row a method, best above: a dot for the mean over seeds, a line for their standard deviation, a stroke for the
    validation accuracy before any training.

    Args:
        summary: columns method, test_mean, test_std (percent; NaN with one seed), start_mean, keep_ratio, as of `comparison.summary`; a
            panel a keep_ratio.
        title: above the figure.
    """
    ratios = sorted(summary["keep_ratio"].unique())
    first = summary[summary["keep_ratio"] == ratios[0]].sort_values("test_mean")
    others = [m for m in summary["method"].unique() if m not in set(first["method"])]
    order = [*others, *first["method"]]
    look = _look(sorted(order))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 + 2.6 * len(ratios), 1.1 + 0.33 * len(order)), layout="constrained")
        panels = figure.subplots(1, len(ratios), sharey=True, sharex=True, squeeze=False)[0]
        for ax, ratio in zip(panels, ratios, strict=True):
            for row in summary[summary["keep_ratio"] == ratio].itertuples():
                y = order.index(row.method)
                std = 0 if pd.isna(row.test_std) else row.test_std
                ax.errorbar(row.test_mean, y, xerr=std, ls="", ms=7, capsize=2, **look[row.method])
                ax.annotate(
                    f"{row.test_mean:.1f}",
                    (row.test_mean, y),
                    xytext=(0, 7),
                    textcoords="offset points",
                    fontsize="x-small",
                    ha="center",
                )
                ax.plot(row.start_mean, y, marker="|", color=_color(row.method), ms=9, mew=2)
            ax.set_title(f"keep_ratio {ratio:g}")
            ax.set_yticks(range(len(order)), order)
            ax.set_ylim(-0.5, len(order) - 0.3)  # the number above the uppermost marker stays inside
            ax.margins(x=0.08)  # as do those above the rightmost
            ax.grid(False, axis="y")
        figure.supxlabel("test accuracy, %; stroke: validation accuracy before training", fontsize="medium")
        figure.suptitle(title)
    return figure


def pareto(
    summary: pd.DataFrame, original: tuple[float, float], published: pd.DataFrame, title: str
) -> Figure:
    """Test accuracy against the share of multiply-adds left, ours joined over keep ratios, published points beside them.

    Args:
        summary: as of `ranking`, with the column macs.
        original: multiply-adds and test accuracy in percent of the network that is pruned.
        published: columns name, macs_left, test_accuracy (percent).
        title: above the figure.
    """
    look = _look(sorted(summary["method"].unique()))
    with matplotlib.rc_context(STYLE):
        legend = 0.21 * (len(look) + 2) / 2  # inches
        figure = Figure(figsize=(9.6, 5.0 + legend), layout="constrained")
        ax = figure.subplots()
        macs, accuracy = original
        ax.axhline(accuracy, color="black", lw=1, ls=":")
        ax.annotate(f"the network that is pruned, {accuracy:.1f} %", (0, accuracy), xycoords=("axes fraction", "data"),
                    xytext=(4, 4), textcoords="offset points", fontsize="small")  # fmt: skip
        for method, own in summary.groupby("method", sort=True):
            own = own.sort_values("macs")
            ax.errorbar(100 * own["macs"] / macs, own["test_mean"], yerr=own["test_std"].fillna(0), lw=1.1, ms=6, capsize=2,
                        label=method, **look[method])  # fmt: skip
        for n, row in enumerate(published.itertuples()):
            ax.plot(row.macs_left, row.test_accuracy, marker="*", ms=13, ls="", color="white", markeredgecolor="black",
                    label="published: full-width VGG-16, other training" if n == 0 else None)  # fmt: skip
            side = -1 if n % 2 == 0 else 1  # two stand close together
            ax.annotate(row.name, (row.macs_left, row.test_accuracy), xytext=(9 * side, -3), textcoords="offset points",
                        ha="right" if side < 0 else "left", fontsize="small")  # fmt: skip
        ax.set_xscale("log")
        ticks = [5, 10, 20, 30, 50]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("multiply-adds left, % (logarithmic)")
        ax.set_ylabel("test accuracy, %")
        ax.set_title(title)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def beside_published(
    summary: pd.DataFrame, original: tuple[float, float], published: pd.DataFrame, title: str
) -> Figure:
    """What methods make of a network of full width, beside published results; arguments as of `pareto`."""
    look = _look(sorted(summary["method"].unique()))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        ax = figure.subplots()
        macs, accuracy = original
        ax.axhline(accuracy, color="black", lw=1, ls=":")
        ax.annotate(f"before pruning, {accuracy:.1f} %", (1, accuracy), xycoords=("axes fraction", "data"),
                    xytext=(-4, 4), textcoords="offset points", ha="right", fontsize="small")  # fmt: skip
        for row in summary.itertuples():
            left, std = 100 * row.macs / macs, 0 if pd.isna(row.test_std) else row.test_std
            ax.errorbar(
                left, row.test_mean, yerr=std, ls="", ms=9, capsize=3, label=row.method, **look[row.method]
            )
            ax.annotate(f"{row.test_mean:.1f}", (left, row.test_mean), xytext=(-9, -4), textcoords="offset points",
                        ha="right", weight="bold")  # fmt: skip
        for n, row in enumerate(published.itertuples()):
            ax.plot(row.macs_left, row.test_accuracy, marker="*", ms=13, ls="", color="white", markeredgecolor="black",
                    label="published: another VGG-16 to begin with, other training" if n == 0 else None)  # fmt: skip
            ax.annotate(f"{row.name}, {row.test_accuracy:.1f}", (row.macs_left, row.test_accuracy), xytext=(9, -3),
                        textcoords="offset points", fontsize="small")  # fmt: skip
        ax.set_xlim(8, 30)
        ax.set_ylim(top=max(accuracy, published["test_accuracy"].max(), summary["test_mean"].max()) + 0.6)
        ax.set_xlabel("multiply-adds left, %")
        ax.set_ylabel("test accuracy, %")
        ax.set_title(title)
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize="small")
    return figure


def budget_curves(budgets: pd.DataFrame, original: float, title: str) -> Figure:
    """Validation accuracy against images seen, from none on, and below against seconds; a column for each way of teaching and of choosing widths.

    Args:
        budgets: columns method, images, seconds, val_accuracy, start_accuracy (percent).
        original: validation accuracy of the network that is pruned, percent.
        title: above the figure.
    """
    parts = {m: m.split(", ") for m in sorted(budgets["method"].unique())}
    ways = {
        m: f"{'distilled' if 'distilled' in own else 'labels alone'}, {WIDTHS if WIDTHS in own else 'one ratio for all'}"
        for m, own in parts.items()
    }
    names = {m: ", ".join(p for p in own if p not in ("distilled", WIDTHS)) for m, own in parts.items()}
    columns = sorted(set(ways.values()), key=lambda way: (WIDTHS in way, "distilled" in way))
    look, most = _look(sorted(set(names.values()))), budgets["images"].max() / 1000
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.5 + 4.2 * len(columns), 9.6), layout="constrained")
        axes = figure.subplots(2, len(columns), sharey=True, sharex="row", squeeze=False)
        for method, own in budgets.groupby("method", sort=True):
            own = own.sort_values("images")
            column, name = columns.index(ways[method]), names[method]
            seen, reached = list(own["images"] / 1000), list(own["val_accuracy"])
            filled = _color(name) if "distilled" in ways[method] else "white"
            style = {"lw": 1.2, "ms": 6, "label": name} | look[name] | {"markerfacecolor": filled}
            axes[0, column].plot([0, *seen], [own["start_accuracy"].iloc[0], *reached], **style)
            axes[1, column].plot(own["seconds"], reached, **style)
        for ax, way in zip(axes[0], columns, strict=True):
            ax.set_title(way, fontsize="medium")
            ax.set_xscale("symlog", linthresh=20)
            ticks = [t for t in (0, 20, 60, 120, 360, 1200, 12_000, 120_000) if t <= 1.1 * most]
            ax.set_xticks(ticks, [f"{t:,}" for t in ticks])
            ax.set_xlabel("thousand images seen (linear up to 20, then logarithmic)", fontsize="small")
        for ax in axes[1]:
            ax.legend(loc="lower right", fontsize="small")  # where little is drawn; of both rows
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("seconds of training and preparation, one core (logarithmic)", fontsize="small")
        for ax in axes.flat:
            ax.axhline(original, color="black", lw=1, ls=":")
            ax.set_ylim(0, max(95, original + 2))
        for ax in axes[:, 0]:
            ax.set_ylabel("validation accuracy, %")
        figure.suptitle(title)
    return figure


def cliffs(curves: pd.DataFrame, title: str, columns: int = 3) -> Figure:
    """A panel a way: the blended accuracy, what would be left if it were folded, and how much of the signal is wide.

    Args:
        curves: columns method, images, alpha, split, metric ("accuracy", "fold_now_running", "fold_now", those of `recorded_shares`), value (a share of 1),
            as of `comparison.curves`.
        title: above the figure.
        columns: panels a row.
    """
    ways = list(dict.fromkeys(curves["method"]))
    rows = -(-len(ways) // columns)
    curves = curves[curves["split"] == "val"].assign(x=curves["images"] / 1000, y=100 * curves["value"])
    measured = curves[curves["metric"].isin(["accuracy", *FOLD_NOW])]["y"]
    lowest = SMALL if curves["alpha"].isna().all() and measured.min() >= SMALL else 0
    label = f"validation accuracy{', at its alpha' if curves['alpha'].notna().any() else ''}"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * columns, 0.9 + 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for ax, way in zip(panels.flat, ways, strict=False):
            _cliff(ax, curves[curves["method"] == way], label)
            ax.set_ylim(lowest, 100)
            ax.set_title(fill(way.replace(", distilled", " (distilled)"), 48), fontsize="small")
        for ax in panels.flat[len(ways) :]:
            ax.set_axis_off()
        # The lowest of each column, also where the last row ends before.
        for ax in panels.flat[max(len(ways) - columns, 0) : len(ways)]:
            ax.set_xlabel("thousand images seen")
            ax.tick_params(labelbottom=True)
        for ax in panels[:, 0]:
            ax.set_ylabel("%")
        drawn = {
            label: line
            for ax in panels.flat
            for line, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=min(columns, 3), frameon=False)
        figure.suptitle(title)
    return figure


def _cliff(ax: Axes, own: pd.DataFrame, what: str) -> None:
    # In the order of training: where a stage ends and the next begins there are two, and the line falls or rises between them.
    accuracy = own[own["metric"] == "accuracy"]
    share = recorded_shares(own).groupby("x", as_index=False)["y"].mean()
    now = own[own["metric"].isin(FOLD_NOW)].drop_duplicates("x", keep="last")
    # Wide enough to be seen below the other, if there is one, with which it is one at alpha 0.
    ax.plot(accuracy["x"], accuracy["y"], color="#3d4650", lw=3.2 if len(now) else 1.6, label=what)
    if len(now):
        ax.plot(
            now["x"], now["y"], color="royalblue", marker="o", ms=4, lw=1.6, label="if it were folded now"
        )
    if len(share):
        label = "share of the signal that is wide, mean over layers"
        ax.plot(share["x"], share["y"], color="goldenrod", ls="--", lw=1.2, label=label)
    last = accuracy.iloc[-1]
    above = 5 if last["y"] < 90 else -14  # within the frame
    ax.annotate(f"{last['y']:.1f}", (last["x"], last["y"]), xytext=(-3, above), textcoords="offset points", ha="right",
                fontsize="small", weight="bold")  # fmt: skip
    starts = own.dropna(subset=["alpha"]).groupby(["experiment", "stage", "alpha"], sort=False)["x"].min()
    every = max(-(-len(starts) // MOST_ALPHAS), 1)
    for (_, _, alpha), x in list(starts.items())[::every]:
        ax.axvline(x, color="#cfd4da", lw=0.8, zorder=0)
        ax.annotate(f"α {alpha:.2g}", (x, 2), xytext=(2, 0), textcoords="offset points",
                    fontsize="xx-small", color="#5a6470")  # fmt: skip


def share_maps(shares: pd.DataFrame, title: str) -> Figure:
    """A map a way: how much of what each layer reads is wide, at the end of training at each alpha.

    Args:
        shares: columns method, alpha, step, start, layer, value (a share of 1), as of `blend.recorded_shares`.
        title: above the figure.
    """
    ways = list(dict.fromkeys(shares["method"]))
    layers = list(dict.fromkeys(shares["layer"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 3.1 * len(ways), 1.5 + 0.24 * len(layers)), layout="constrained")
        panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
        for ax, way in zip(panels, ways, strict=True):
            own = shares[shares["method"] == way].sort_values(["start", "step"])
            grid = own.groupby(["layer", "alpha"])["value"].last().unstack()
            grid = grid.reindex(layers)[sorted(grid.columns, reverse=True)]
            sns.heatmap(100 * grid, ax=ax, vmin=0, vmax=100, cmap="cividis", annot=True, fmt=".0f", annot_kws={"size": 7},
                        cbar=ax is panels[-1], cbar_kws={"label": "% of the variance that is wide"})  # fmt: skip
            ax.set_xlabel("α")
            ax.set_ylabel("")
            ax.set_xticklabels([f"{a:.2g}" for a in grid.columns], rotation=0)
            ax.set_title(way.replace(", distilled", "\n(distilled)"), fontsize="small")
        figure.suptitle(title)
    return figure


def untrained(table: pd.DataFrame, title: str) -> Figure:
    """Accuracy against alpha without any training, a panel a way to start the branches.

    Args:
        table: columns init, alpha, as_it_was, measured_anew, wide_share (shares of 1), as of `blend.without_training`.
        title: above the figure.
    """
    inits = list(dict.fromkeys(table["init"]))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(inits), 3.6), layout="constrained")
        for ax, init in zip(figure.subplots(1, len(inits), sharey=True), inits, strict=True):
            own = table[table["init"] == init]
            for column, color, style, label in (
                ("as_it_was", "#3d4650", "o-", "accuracy"),
                ("measured_anew", "royalblue", "s-", "accuracy, BatchNorm statistics measured anew"),
                ("wide_share", "goldenrod", "--", "share of the signal that is wide"),
            ):
                ax.plot(own["alpha"], 100 * own[column], style, color=color, ms=4, lw=1.4, label=label)
            ax.set_xlim(1.02, -0.02)
            ax.set_ylim(0, 100)
            ax.set_xlabel("α, falling to the right")
            ax.set_title(f"branches: {init.replace('_', ' ')}", fontsize="medium")
        figure.axes[0].set_ylabel("%")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.suptitle(title)
    return figure


def dead_map(table: pd.DataFrame, title: str) -> Figure:
    """A row a model, a column a ReLU: the share of the channels that are 0 for every image.

    Args:
        table: columns model, layer, dead (a share of 1), as of `dead.dead_channels`.
        title: above the figure.
    """
    grid = 100 * table.pivot(index="model", columns="layer", values="dead")
    grid = grid.reindex(dict.fromkeys(table["model"]))[list(dict.fromkeys(table["layer"]))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 0.6 * grid.shape[1], 2.2 + 0.42 * grid.shape[0]), layout="constrained")
        ax = figure.subplots()
        sns.heatmap(grid, ax=ax, vmin=0, vmax=100, cmap="rocket_r", annot=True, fmt=".0f", annot_kws={"size": 8},
                    cbar_kws={"label": "% of channels dead"})  # fmt: skip
        ax.set_xticks([i + 0.5 for i in range(grid.shape[1])], grid.columns, rotation=45, ha="right")
        ax.tick_params(axis="y", rotation=0)
        ax.set_xlabel("ReLU")
        ax.set_ylabel("")
        ax.set_title(title)
    return figure


def ways(table: pd.DataFrame, title: str) -> Figure:
    """For each model a panel: a bar for each way on, what it began with and what it reached.

    Args:
        table: columns model, way, before, reached (validation accuracy at alpha 0, percent).
        title: above the figure.
    """
    models = list(dict.fromkeys(table["model"]))
    names = list(dict.fromkeys(table["way"]))[::-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4 + 2.9 * len(models), 1.1 + 0.42 * len(names)), layout="constrained")
        panels = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
        for ax, model in zip(panels, models, strict=True):
            own = table[table["model"] == model]
            place = [names.index(w) for w in own["way"]]
            ax.barh(place, own["reached"], height=0.6, color="royalblue")
            for at, reached, before in zip(place, own["reached"], own["before"], strict=True):
                # Behind the bar, or behind the stroke where that is further out.
                ax.annotate(f"{reached:.1f}", (max(reached, before), at), xytext=(4, 0), textcoords="offset points",
                            va="center", fontsize="small")  # fmt: skip
            ax.plot(
                own["before"], place, ls="", marker="|", ms=13, mew=2.2, color="darkorange", label="before"
            )
            ax.set_title(model, fontsize="medium")
            ax.set_xlim(0, 100)
            ax.set_yticks(range(len(names)), names)
            ax.set_xlabel("validation accuracy, %")
            ax.grid(False, axis="y")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", frameon=False)
        figure.suptitle(title)
    return figure
