"""Write the tables of README.md and docs/controls.md, and the pictures budgets, pareto, annealing and full_width of docs/, anew from the records.   python docs/controls.py"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import yaml
from matplotlib.figure import Figure

from alphaprune.comparison import curves, original, summary
from alphaprune.course import FOLD_NOW_RUNNING, falls, with_falling_alpha
from alphaprune.method_plots import WIDTHS, beside_published, budget_curves, cliffs, pareto
from alphaprune.pace import at_seconds, recorded, timed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "quick"
# What the README shows of the methods.
SHORT = (  # our recipe first, then what it adds to
    "alphaprune, annealed, widths by sensitivity, distilled",
    "alphaprune, folded at once, widths by sensitivity, distilled",
    "torch-pruning group L2, widths by sensitivity, distilled",
    "torch-pruning L1, widths by sensitivity, distilled",
    "alphaprune, annealed, distilled",
    "torch-pruning group L2, distilled",
    "torch-pruning L1, distilled",
    "scratch, distilled",
    "report's recipe",
)
HEAD = ["keep_ratio 0.2: 4 % of the multiply-adds", "0.34375: 12 %", "0.5: 26 %"]
RATIOS = (0.2, 0.34375, 0.5)


def blocks() -> dict[str, str]:
    """The tables by name, in Markdown."""
    rows = summary(pd.read_csv(RESULTS / "controls.csv"))
    one = rows[rows["keep_ratio"] == 0.34375]
    found = {
        "short": _short(rows),
        "one ratio": _one(one),
        "all": _all(rows),
        "aims": _aims(rows),
        "mirrored": _against(rows, "mirrored", "mirrored", "cropped", "mirrored alone"),
        "small batches": _against(rows, "small_batches", "batches of 64", "batches of 128", "batches of 64"),
        "roots": _against(rows, "roots", "roots", "damages", "roots of damages"),
        "ranked": _against(rows, "ranked", "ranked", "one ratio for all", "ranked"),
        "muon": _against(rows, "muon", "Muon", "SGD", "Muon"),
        "ten seeds": _ten_seeds(rows),
        "residual": _one(summary(pd.read_csv(RESULTS / "residual.csv"))),
        "course": _course(),
        "cliff": _cliff(),
        "budgets": _budgets(),
    }
    timed_apart = len(recorded("controls", "quick", ROOT)) > 0
    return found | ({"seconds": _seconds()} if timed_apart else {})


def _accuracy(row: pd.Series, best: bool) -> str:
    text = f"{row['test_mean']:.2f} ± {row['test_std']:.2f}"
    return f"**{text}**" if best else text


def _best(rows: pd.DataFrame) -> dict[float, str]:
    """By keep_ratio the method with the highest test accuracy, which is shown in bold."""
    return {r: own.loc[own["test_mean"].idxmax(), "method"] for r, own in rows.groupby("keep_ratio")}


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *lines])


def _by_ratio(rows: pd.DataFrame, method: str) -> list[str]:
    own, best = rows[rows["method"] == method].set_index("keep_ratio"), _best(rows)
    return [_accuracy(own.loc[r], best[r] == method) if r in own.index else "not run yet" for r in RATIOS]


def _short(rows: pd.DataFrame) -> str:
    if unknown := set(SHORT) - set(rows["method"]):
        raise SystemExit(f"no method of results/quick/controls.csv is called {sorted(unknown)[0]!r}")
    return _table(["", *HEAD], [[m, *_by_ratio(rows, m)] for m in SHORT])


def _one(rows: pd.DataFrame) -> str:
    lines = [
        [
            r["method"],
            _accuracy(r, _best(rows)[r["keep_ratio"]] == r["method"]),
            f"{r['start_mean']:.1f}",
            f"{r['params']:,}",
            f"{r['lr']:g}",
        ]
        for _, r in rows.sort_values("test_mean", ascending=False).iterrows()
    ]
    return _table(["method", "test accuracy", "before training, validation", "parameters", "lr"], lines)


def _all(rows: pd.DataFrame) -> str:
    lowest = rows[rows["keep_ratio"] == 0.2].set_index("method")["test_mean"]
    methods = sorted(rows["method"].unique(), key=lambda m: -lowest.get(m, 0.0))
    return _table(["method", *HEAD], [[m, *_by_ratio(rows, m)] for m in methods])


def _aims(rows: pd.DataFrame) -> str:
    """By how much the recipe is ahead of the best of others, and which share of the report's loss it has; what is not reached in bold."""
    means = rows.pivot_table(index="method", columns="keep_ratio", values="test_mean")
    widths, method = means.index.str.contains(WIDTHS), means.index
    torch_pruning, scratch = method.str.startswith("torch-pruning"), method.str.startswith("scratch")
    ours, annealed, at_once = (means.loc[m] for m in (SHORT[0], "alphaprune, annealed, distilled", SHORT[1]))
    one_ratio_at_once = means.loc["alphaprune, folded at once, distilled"]
    aims = (
        ("1.0 ahead of Torch-Pruning, one ratio for all", ours - means[torch_pruning & ~widths].max(), 1.0),
        ("the same, at our widths", ours - means[torch_pruning & widths].max(), 1.0),
        ("6 ahead of scratch", ours - means[scratch].max(), 6.0),
        ("never below folding at once", ours - at_once, 0.0),
        ("the same, one ratio for all", annealed - one_ratio_at_once, 0.0),
    )
    lines = [[what, *(_reached(f"{v[r]:+.2f}", v[r] >= aim) for r in RATIOS)] for what, v, aim in aims]
    before = original("controls", "quick", ROOT)["test_accuracy"]
    share = 100 * (before - ours) / (before - means.loc["report's recipe"])
    half = "at most half of what the report's recipe loses"
    lines.append([half, *(_reached(f"{share[r]:.1f} %", share[r] <= 50) for r in RATIOS)])
    return _table(["aim", *map(str, RATIOS)], lines)


def _against(controls: pd.DataFrame, name: str, other: str, plain: str, changed: str) -> str:
    """A comparison of the same methods trained otherwise beside those of `controls`; then what each loses against the original, in percent of what the report's recipe loses (that of `controls` where the comparison has none).

    Args:
        controls: the rows of `controls`.
        name: the comparison.
        other: what its methods are called beyond the names of `controls`.
        plain, changed: how `controls` and it train, in words.
    """
    rows = summary(pd.read_csv(RESULTS / f"{name}.csv"))
    rows["beside"] = rows["method"].str.replace(f", {other}", "")
    before = original(name, "quick", ROOT)["test_accuracy"]
    pairs = rows.merge(controls, left_on=["beside", "keep_ratio"], right_on=["method", "keep_ratio"])
    if len(pairs) != len(rows):
        raise SystemExit(f"a method of results/quick/{name}.csv has no partner in controls.csv")
    # The report's recipe, as plain and, where it is of this comparison too, as changed.
    report = {
        "test_mean_y": controls[controls["method"] == "report's recipe"].set_index("keep_ratio")["test_mean"]
    }
    if len(own := pairs[pairs["beside"] == "report's recipe"]):
        report["test_mean_x"] = own.set_index("keep_ratio")["test_mean_x"]
    if "test_mean_x" in report:
        loses = {
            ("test_mean_y", "test_mean_y"): f"both {plain}",
            ("test_mean_x", "test_mean_x"): f"both {changed}",
            ("test_mean_x", "test_mean_y"): f"{changed}, of the report's {plain}",
        }
    else:
        loses = {("test_mean_y", "test_mean_y"): plain, ("test_mean_x", "test_mean_y"): changed}
    lines = []
    for _, p in pairs.sort_values(["keep_ratio", "test_mean_x"], ascending=[True, False]).iterrows():
        shares = (
            f"{100 * (before - p[mine]) / (before - report[theirs][p['keep_ratio']]):.1f} %"
            for mine, theirs in loses
        )
        accuracies = (f"{p[f'test_mean_{s}']:.2f} ± {p[f'test_std_{s}']:.2f}" for s in "yx")
        gain = f"{p['test_mean_x'] - p['test_mean_y']:+.2f}"
        rates = f"{p['lr_y']:g}, {p['lr_x']:g}"
        lines.append([p["beside"], f"{p['keep_ratio']:g}", *accuracies, gain, rates, *shares])
    head = ["method", "keep_ratio", plain, changed, "gain", f"rate, {plain} and {changed}"]
    first, *others = loses.values()
    return _table([*head, f"points lost, in percent of the report's recipe's: {first}", *others], lines)


def _ten_seeds(controls: pd.DataFrame) -> str:
    """What the first of SHORT loses in percent of the report's recipe with its three and with ten seeds, and the standard error:  s / sqrt(n)  of a mean, relative ones added as squares."""
    at, before = controls[controls["keep_ratio"] == 0.2], original("controls", "quick", ROOT)["test_accuracy"]
    ten = summary(pd.read_csv(RESULTS / "ten_seeds.csv"))
    rows = pd.concat([at[at["method"].isin([SHORT[0], "report's recipe"])], ten], ignore_index=True)
    rows["lost"] = before - rows["test_mean"]
    rows["error"] = rows["test_std"] / rows["seeds"] ** 0.5 / rows["lost"]
    ours = rows[rows["method"] == SHORT[0]].iloc[0]
    lines = []
    for _, r in rows.iterrows():
        share = 100 * ours["lost"] / r["lost"]
        of_it = f"{share:.1f} ± {share * (ours['error'] ** 2 + r['error'] ** 2) ** 0.5:.1f} %"
        accuracy = f"{r['test_mean']:.2f} ± {r['test_std']:.2f}"
        lost = f"{r['lost']:.2f} ± {r['lost'] * r['error']:.2f}"
        lines.append([r["method"], f"{r['seeds']}", accuracy, lost, "" if r["method"] == SHORT[0] else of_it])
    return _table(["method", "seeds", "test accuracy", "points lost ± standard error", "ours loses of that"], lines)  # fmt: skip


def _reached(text: str, holds: bool) -> str:
    return text if holds else f"**{text}, not reached**"


def _timed_budgets() -> pd.DataFrame:
    """Budgets with the seconds of each method's pace, or those that were counted where none is recorded."""
    rows, pace = pd.read_csv(RESULTS / "controls_budgets.csv"), recorded("controls", "quick", ROOT)
    return timed(rows, pace) if len(pace) else rows


def _budgets() -> str:
    rows = _timed_budgets()
    by_images = rows.pivot_table(index="method", columns="images", values="val_accuracy")
    by_images.insert(0, 0, rows.groupby("method")["start_accuracy"].first())
    return _best_in_bold(by_images.sort_values(_usual(), ascending=False), [f"{n:,}" for n in by_images])


def _seconds() -> str:
    rows, pace = _timed_budgets(), recorded("controls", "quick", ROOT).set_index("method")
    order = rows[rows["images"] == _usual()].sort_values("val_accuracy", ascending=False)["method"]
    table = at_seconds(rows).reindex(order)
    cells = pd.DataFrame(
        {
            "before, s": pace["before"].map("{:.1f}".format),
            "ms an image": (1000 * pace["an_image"]).map("{:.2f}".format),
        }
    )
    return _best_in_bold(table, [f"{n:,} s" for n in table], cells)


def _usual() -> int:
    """Images of the preset's own budget."""
    return pd.read_csv(RESULTS / "controls.csv")["images"].iloc[0]


def _best_in_bold(table: pd.DataFrame, head: list[str], before: pd.DataFrame | None = None) -> str:
    """Accuracies by method, the best of each column in bold, – where there is none; behind cells of text if there are any."""
    best = table.round(1).max()
    lines = [
        [
            method,
            *(() if before is None else before.loc[method]),
            *(
                "–" if pd.isna(v) else f"**{v:.1f}**" if round(v, 1) == best[n] else f"{v:.1f}"
                for n, v in row.items()
            ),
        ]
        for method, row in table.iterrows()
    ]
    return _table(["method", *(() if before is None else before.columns), *head], lines)


def _cliff() -> str:
    table = pd.read_csv(RESULTS / "cliff.csv").set_index("method")
    lost = falls(curves("cliff", "quick", table.reset_index(), root=ROOT)).set_index("method")
    percent = lambda share: "–" if pd.isna(share) else f"{100 * share:.1f}"  # noqa: E731
    lines = []
    for method, row in lost.sort_values("reached").iterrows():
        rates = [float(lr) for lr in str(table.loc[method, "searched"]).split()]
        lr = table.loc[method, "lr"]
        end = " (the lowest tried)" if lr == min(rates) else ""
        measured = [percent(row[c]) for c in ("blended", "fold_now", "first_at_0", "reached")]
        lines.append([method, f"{lr:g}{end}", *measured])
    head = [
        "way",
        "lr",
        "blended, at the last alpha above 0",
        "the same weights folded",
        "after an epoch at alpha 0",
    ]
    return _table([*head, "reached"], lines)


def _course() -> str:
    """What the first of SHORT would score if it were folded, epoch by epoch, and while alpha is above 0 the blend."""
    table = pd.read_csv(RESULTS / "controls.csv")
    found = curves("controls", "quick", table[table["method"] == SHORT[0]], ROOT)
    own = found[(found["split"] == "val") & found["metric"].isin(["accuracy", FOLD_NOW_RUNNING])]
    alphas = own.groupby("epoch")["alpha"].first()
    lines = []
    for ratio in RATIOS:
        at = own[own["keep_ratio"] == ratio].pivot_table(index="epoch", columns="metric", values="value")
        cells = [
            f"{100 * now:.1f}" + (f" ({100 * blend:.1f})" if alphas[epoch] > 0 else "")
            for epoch, blend, now in zip(at.index, at["accuracy"], at[FOLD_NOW_RUNNING], strict=True)
        ]
        lines.append([f"{ratio:g}", *cells])
    head = [f"epoch {epoch}, alpha {alpha:.2g}" for epoch, alpha in alphas.items()]
    return _table(["keep_ratio", *head], lines)


def _annealing(table: pd.DataFrame) -> Figure:
    """How the methods in which alpha falls came there, a row a keep_ratio."""
    courses = with_falling_alpha(curves("controls", "quick", table, ROOT))
    columns = courses.groupby("keep_ratio")["method"].nunique().max()
    return cliffs(courses, "Blended accuracy, and what would be left", columns)


def written(page: str, tables: dict[str, str]) -> str:
    """A page with the tables between `<!-- table: name -->` and `<!-- end of table -->` replaced."""

    def replaced(found: re.Match[str]) -> str:
        return f"{found[1]}\n{tables[found[2]]}\n{found[3]}"

    return re.sub(r"(<!-- table: ([\w ]+) -->).*?(<!-- end of table -->)", replaced, page, flags=re.DOTALL)


def main() -> None:
    tables = blocks()
    for page in (ROOT / "README.md", ROOT / "docs" / "controls.md"):
        page.write_text(written(page.read_text(), tables))
        print(page.relative_to(ROOT))
    whole = original("controls", "quick", ROOT)
    published = pd.DataFrame(yaml.safe_load((ROOT / "params" / "published.yaml").read_text()))
    table = pd.read_csv(RESULTS / "controls.csv")
    rows = summary(table)
    figures = {
        "annealing": _annealing(table),
        "budgets": budget_curves(_timed_budgets(), whole["val_accuracy"], "What a budget buys"),
        "pareto": pareto(
            rows[rows["method"].isin(SHORT)],
            (whole["macs"], whole["test_accuracy"]),
            published,
            "Accuracy against multiply-adds",
        ),
    }
    full, of_full = original("full_size", "report", ROOT), ROOT / "results" / "report" / "full_size.csv"
    figures["full_width"] = beside_published(
        summary(pd.read_csv(of_full)),
        (full["macs"], full["test_accuracy"]),
        published,
        "VGG-16 on CIFAR-10, pruned",
    )
    for name, figure in figures.items():
        figure.savefig(ROOT / "docs" / f"{name}.png", dpi=100)
        print(f"docs/{name}.png")


if __name__ == "__main__":
    main()
