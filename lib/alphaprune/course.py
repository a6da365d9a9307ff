"""What was recorded while alpha fell: what the network would have scored if folded, what each layer read, what was lost at alpha 0."""

from __future__ import annotations

import pandas as pd

# Metrics in records, beside accuracy and loss. While a stage trains, and at its end, of its best weights:
FOLD_NOW_RUNNING, FOLD_NOW_AT_END = "fold_now_running", "fold_now"
FOLD_NOW = (FOLD_NOW_RUNNING, FOLD_NOW_AT_END)
WIDE_SHARE = "wide_share:"  # of a layer, whose name follows


def recorded_shares(curves: pd.DataFrame) -> pd.DataFrame:
    """The shares that were measured while stages trained, one a row.

    Args:
        curves: columns metric and value and any others, as of `Experiment.curves` and `comparison.curves`.

    Returns:
        The rows of those measurements, with the column `layer`.
    """
    rows = curves[curves["metric"].str.startswith(WIDE_SHARE)]
    return rows.assign(layer=rows["metric"].str.removeprefix(WIDE_SHARE))


def with_falling_alpha(curves: pd.DataFrame) -> pd.DataFrame:
    """The courses of those methods in which alpha falls, each with its keep_ratio in its name, by keep_ratio.

    Args:
        curves: with the column keep_ratio, as of `comparison.curves`.
    """
    own = curves[curves.groupby("method")["alpha"].transform("max") > 0]
    names = own["method"] + ", keep_ratio " + own["keep_ratio"].map("{:g}".format)
    return own.assign(method=names).sort_values("keep_ratio", kind="stable")


def falls(curves: pd.DataFrame) -> pd.DataFrame:
    """What each way loses where alpha becomes 0.

    Args:
        curves: as of `comparison.curves`.

    Returns:
        A row a method, accuracies as shares of 1, NaN where nothing was measured: `blended` the best after training at the last alpha above 0, `fold_now` of the same
        weights, `first_at_0` after the first epoch of which every step was at alpha 0, `reached` the best at alpha 0 of the last stage.
    """
    rows = []
    for method, own in curves[curves["split"] == "val"].groupby("method", sort=False):
        row = {"method": method} | dict.fromkeys(
            ("blended", "fold_now", "first_at_0", "reached"), float("nan")
        )
        alphas = own["alpha"].fillna(0.0)  # a folded network has none
        parts = [part for _, part in own.groupby([own["stage"], alphas], sort=False)]
        above = [p for p in parts if p["alpha"].iloc[0] > 0]
        at_0 = [p for p in parts if not p["alpha"].iloc[0] > 0]
        begun = 0  # the epoch after which training at alpha 0 begins
        if above:
            last = above[-1]
            trained = last[(last["metric"] == "accuracy") & (last["epoch"] > 0)]
            row["blended"] = trained["value"].max()
            row["fold_now"] = _last(last[last["metric"].isin(FOLD_NOW)])
            if at_0 and at_0[0]["stage"].iloc[0] == last["stage"].iloc[0]:  # it fell within the stage
                begun = at_0[0]["epoch"].min()
        if at_0:
            accuracy = at_0[0][at_0[0]["metric"] == "accuracy"]
            row["first_at_0"] = _first(accuracy[accuracy["epoch"] > begun])
            row["reached"] = at_0[-1][at_0[-1]["metric"] == "accuracy"]["value"].max()
        rows.append(row)
    return pd.DataFrame(rows)


def _first(rows: pd.DataFrame) -> float:
    return rows["value"].iloc[0] if len(rows) else float("nan")


def _last(rows: pd.DataFrame) -> float:
    return rows["value"].iloc[-1] if len(rows) else float("nan")
