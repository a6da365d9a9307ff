"""Several methods on the same images, each with its own best learning rate.

    python -m alphaprune.comparison controls quick --jobs 2

The methods are data: `params/<name>.yaml` holds stages and settings, `params/<preset>/<name>.yaml` what all of them share. Each method
gets its learning rate from the same search on the validation images, with the first seed; at the first keep_ratio it begins at the file's
`first_lr`, at the others at the rate that was best there. All other seeds run with the rate of their ratio. The
epochs of the preset are divided evenly among a method's stages, so that all see the same number of images as nearly as
whole epochs allow, or an epoch of fewer images a stage. What has run is recorded, stage by
stage, and not run again.
"""

from __future__ import annotations

if __name__ == "__main__":
    from alphaprune.interrupt import while_importing

    while_importing()

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field

from alphaprune import pretrained
from alphaprune.errors import Missing, UsageError
from alphaprune.experiment import Experiment
from alphaprune.interrupt import Interrupted, ending_with_a_line, leave_to_parent
from alphaprune.methods import (
    Comparison,
    KeepRatio,
    Seed,
    check,
    check_method,
    chosen_methods,
    experiment,
    final,
    load_comparison,
    of_budget,
    settings_of,
)
from alphaprune.provenance import merged
from alphaprune.settings import Settings, load_settings, project_root
from alphaprune.storage import write_bytes

COLUMNS = [
    "method", "seed", "keep_ratio", "images", "seconds", "params", "macs", "val_accuracy", "test_accuracy", "start_accuracy", "lr",
    "searched",
]  # fmt: skip
LIKE = ["method", "seed", "keep_ratio"]  # of rows that are made together
_Rows = dict[
    tuple[int, int, float], list[dict[str, Any]]
]  # by places of the keep_ratio and the method, and budget


@dataclass(frozen=True)
class _Method:
    """A method of a comparison, and where that lies."""

    name: str
    preset: str
    root: Path
    method: str

    def of(self, lr: float, keep_ratio: float, seed: int, budget: float = 1.0) -> Experiment:
        return experiment(self.name, self.preset, self.method, lr, keep_ratio, seed, budget, self.root)

    def further(self, budgets: Sequence[float]) -> list[float]:
        """Those budgets that differ from smaller ones and from the preset's own: small ones of many stages may all be an epoch a stage."""
        plan = load_comparison(self.name, self.root)
        settings = self._settings(plan.first_lr, plan.keep_ratios[0], plan.seeds[0])
        found = {tuple(of_budget(settings, 1.0).values()): 1.0}
        for budget in sorted(budgets):
            found.setdefault(tuple(of_budget(settings, budget).values()), budget)
        return list(found.values())[1:]

    def train(
        self, lr: float, keep_ratio: float, seed: int, budget: float = 1.0, finals: bool = False
    ) -> Experiment:
        """The experiment that the method is, trained as far as it is not recorded; with `finals` also where the last weights are gone
        before their test accuracy was read."""
        of = self.of(lr, keep_ratio, seed, budget)
        of.run(lambda line: None)
        if finals and final(of) is None:
            of.run(lambda line: None, weights=True)
        for name, outcome in ((n.stage.name, of.record(n.name)["outcome"]) for n in of.stages):
            if outcome["diverged"]:
                where = f"{self.method}, keep_ratio {keep_ratio:g}, lr {lr:g}: stage {name}"
                print(
                    f"{where} ended at step {outcome['steps']}, where the loss was no longer finite; its last good weights count",
                    flush=True,
                )
        return of

    def missing(
        self, lr: float, keep_ratio: float, seed: int, budget: float = 1.0, finals: bool = False
    ) -> str | None:
        """Why something would be trained, None if nothing would; `finals` as of `train`."""
        from alphaprune.layer_widths import recorded

        settings = self._settings(lr, keep_ratio, seed)
        try:
            pretrained.digest(settings, self.root)
        except Missing as e:
            return str(e)
        if settings.widths == "sensitivity" and recorded(settings, self.root) is None:
            return "the widths are not measured yet"
        try:
            of = self.of(lr, keep_ratio, seed, budget)
        except UsageError as e:  # such as widths that cannot be
            return str(e)
        whys = ((n.stage.name, of.why(n, same=("stage", "seed")) or of.weights_damage(n)) for n in of.stages)
        if found := next((f"{stage} {why}" for stage, why in whys if why is not None), None):
            return found
        last = of.stages[-1]
        if finals and final(of) is None and not of.weights(last).is_file():
            return f"the weights of {last.stage.name} are missing, and its test accuracy was not read"
        return None

    def reason(
        self, plan: Comparison, ratios: Sequence[float], seeds: Sequence[int], budgets: Sequence[float]
    ) -> str:
        """What would be trained and why, as far as the search of the learning rate can be foreseen."""

        def best(ratio: float, begin: float) -> float:
            def reached(lr: float) -> float:
                if why := self.missing(lr, ratio, plan.seeds[0]):
                    raise LookupError(f"lr {lr:g} is to be tried at keep_ratio {ratio:g}: {why}")
                return _reached(self.of(lr, ratio, plan.seeds[0]))

            return climb(sorted(plan.lrs), begin, reached)

        try:
            first = best(plan.keep_ratios[0], plan.first_lr)
            rates = {ratio: first if ratio == plan.keep_ratios[0] else best(ratio, first) for ratio in ratios}
        except LookupError as e:
            return str(e)
        at = {lr: [r for r in ratios if rates[r] == lr] for lr in rates.values()}
        parts = [f"{lr:g} at keep_ratio {' and '.join(f'{r:g}' for r in own)}" for lr, own in at.items()]
        said = f"lr {', '.join(parts) if len(at) > 1 else format(next(iter(at)), 'g')}"
        runs = [(ratio, seed, budget) for ratio in ratios for seed in seeds for budget in budgets]
        left = [(*run, why) for run in runs if (why := self.missing(rates[run[0]], *run, finals=True))]
        if not left:
            all_runs = f"all {len(runs)} runs are" if len(runs) > 1 else "its run is"
            return f"{all_runs} recorded, {said}"
        ratio, seed, budget, why = left[0]
        of = f", {budget:g} times the budget" if budget != 1 else ""
        return f"{len(left)} of {len(runs)} runs are to be trained, {said}; at keep_ratio {ratio:g}, seed {seed}{of}: {why}"

    def _settings(self, lr: float, keep_ratio: float, seed: int) -> Settings:
        shared = settings_of(self.name, self.root, self.method, lr, keep_ratio, seed)
        return load_settings(self.preset, self.name, self.root, **shared)


def compare(
    name: str,
    preset: str,
    root: Path | None = None,
    methods: Sequence[str] = (),
    keep_ratios: Sequence[float] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    budgets: bool = False,
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Run what is not recorded yet and write `results/<preset>/<name>.csv`, or with budgets `<name>_budgets.csv`.

    Args:
        name: of the comparison, a file in params/.
        preset: a folder in params/ that has an experiment of that name.
        root: the project's folder; found from the working directory if None.
        methods, keep_ratios, seeds: only these; all that the file names if empty.
        jobs: methods that run at once, each in a process of its own.
        budgets: train for the file's further budgets, with the first seed at the first keep_ratio and the rate that was
            found for the budget of the preset, which is in the table too.
        say: takes the lines of progress.

    Returns:
        The table, `COLUMNS`, of what was asked for; accuracies in percent, `images` and `seconds` of the whole training, `seconds`
        with the making of the network before it, `start_accuracy` of the validation images before any training, folded, `searched` the learning
        rates tried. The file has the rows of earlier calls as well.
    """
    root = root or project_root()
    plan = load_comparison(name, root)
    check(
        "jobs",
        jobs,
        Annotated[int, Field(ge=1, le=256)],
        "give the number of methods that run at once, such as 2",
    )
    chosen = _chosen(name, preset, root, methods)
    ratios, seeds = _runs(plan, keep_ratios, seeds, budgets)
    target = root / "results" / preset / (f"{name}_budgets.csv" if budgets else f"{name}.csv")
    for method in chosen:  # before the first of them trains
        for ratio in dict.fromkeys((plan.keep_ratios[0], *ratios)):  # the search begins at the first of all
            check_method(name, preset, method.method, plan.first_lr, ratio, seeds[0], root)
    _earlier(target)
    first = plan.keep_ratios[0]
    rates: dict[tuple[_Method, float], tuple[float, str]] = {}  # and those that were tried
    rows: _Rows = {}
    further = [(size, m) for m in chosen for size in m.further(plan.budgets)] if budgets else []
    searches = len(chosen) * len({first, *ratios})
    runs = len(chosen) * len(ratios) + len(further)

    def found(method: _Method, ratio: float, result: tuple[float, str]) -> None:
        rates[method, ratio] = lr, searched = result
        of = f"the best of {searched}" if " " in searched else "not searched"
        said = f"{method.method}, keep_ratio {ratio:g}: {lr:g}, {of}"
        say(f"[rate {len(rates)}/{searches}] {said}")
        if ratio == first:
            for other in ratios:
                if other != first:
                    search(method, other, lr)
        if ratio in ratios:
            run(method, ratio)

    def reached(place: tuple[int, int, float], result: list[dict[str, Any]]) -> None:
        rows[place] = result
        scores = ", ".join(f"{r['val_accuracy']:.1f}" for r in result)
        of = result[0]
        said = f"{of['method']}, keep_ratio {of['keep_ratio']:g}, {of['images']:,} images"
        say(f"[{len(rows)}/{runs}] {said}: {scores} % validation")
        # Larger budgets of an earlier call stay until they have been looked up again.
        like = LIKE if not budgets or len(rows) == runs else [*LIKE, "images"]
        write_bytes(target, _as_csv(_merged(_earlier(target), _table(rows), plan, like)))

    with _workers(jobs) as pool:
        under_way: dict[Future, Callable[[Any], None]] = {}  # and what is done with what comes of it

        def search(method: _Method, ratio: float, begin: float) -> None:
            task = pool.submit(_until_stopped, _search, method, ratio, begin)
            under_way[task] = partial(found, method, ratio)

        def run(method: _Method, ratio: float, size: float = 1.0) -> None:
            task = pool.submit(_until_stopped, _run, method, *rates[method, ratio], ratio, seeds, size)
            under_way[task] = partial(reached, (ratios.index(ratio), chosen.index(method), size))

        def until_all_is_done() -> None:
            while under_way:
                for task in wait(under_way, return_when=FIRST_COMPLETED).done:
                    under_way.pop(task)(task.result())

        for method in chosen:
            search(method, first, plan.first_lr)
        until_all_is_done()
        for size, method in sorted(further, key=lambda pair: pair[0]):  # the small ones of all methods first
            run(method, ratios[0], size)
        until_all_is_done()
    return _table(rows)


def _table(rows: _Rows) -> pd.DataFrame:
    return pd.DataFrame([row for place in sorted(rows) for row in rows[place]], columns=COLUMNS)


def reasons(
    name: str,
    preset: str,
    root: Path | None = None,
    methods: Sequence[str] = (),
    keep_ratios: Sequence[float] = (),
    seeds: Sequence[int] = (),
    budgets: bool = False,
) -> list[str]:
    """What `compare` would train, and why: a line a method, or a single one where the same holds for all; arguments as of `compare`."""
    root = root or project_root()
    plan = load_comparison(name, root)
    ratios, seeds = _runs(plan, keep_ratios, seeds, budgets)
    what = f"{name} --budgets" if budgets else name
    said: dict[str, str] = {}
    for method in _chosen(name, preset, root, methods):
        sizes = [1.0, *method.further(plan.budgets)] if budgets else [1.0]
        said[method.method] = method.reason(plan, ratios, seeds, sizes)
    if len(said) > 1 and len(set(said.values())) == 1:
        said = {f"each of {len(said)} methods": next(iter(said.values()))}
    return [f"{what}, {of}: {reason}" for of, reason in said.items()]


def _runs(
    plan: Comparison, keep_ratios: Sequence[float], seeds: Sequence[int], budgets: bool
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """The keep_ratios and seeds that are meant, each checked and named once; for budgets the first of each."""
    for ratio in keep_ratios:
        check("keep_ratio", ratio, KeepRatio, "give a share in (0, 1], such as 0.5")
    for seed in seeds:
        check("seed", seed, Seed, "give a whole number from 0")
    ratios = tuple(dict.fromkeys(keep_ratios or plan.keep_ratios))
    seeds = tuple(dict.fromkeys(seeds or plan.seeds))
    return (ratios[:1], seeds[:1]) if budgets else (ratios, seeds)


def _chosen(name: str, preset: str, root: Path, methods: Sequence[str]) -> list[_Method]:
    return [_Method(name, preset, root, method) for method in chosen_methods(name, root, methods)]


@contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes to run in. Where this one is stopped, they are told to save and stop too, and nothing new begins."""
    others = set(multiprocessing.active_children())  # such as a notebook's own
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), leave_to_parent)
    try:
        yield pool
    except BaseException as e:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        pool.shutdown(cancel_futures=True)
        if isinstance(e, BrokenProcessPool):  # such as by the kernel, for want of memory
            raise UsageError(
                "a process that trained was killed; run the same command again with fewer jobs, it goes on"
            ) from None
        raise
    pool.shutdown()


def _until_stopped(task: Callable[..., Any], *arguments: Any) -> Any:
    """Do a task in a worker. Where it is stopped its process ends, since the pool would hand it the next task."""
    try:
        return task(*arguments)
    except Interrupted as e:
        os._exit(e.exit_code)


def _earlier(target: Path) -> pd.DataFrame:
    """The table as earlier calls left it."""
    if not target.exists():
        return pd.DataFrame(columns=COLUMNS)
    numbers = [c for c in COLUMNS if c not in ("method", "searched")]
    try:
        table = pd.read_csv(target, dtype=dict.fromkeys(numbers, float) | {"method": str, "searched": str})
        if list(table.columns) != COLUMNS or not np.isfinite(table[numbers]).all(axis=None):
            raise ValueError("a column is missing, or a number")
        return table.astype({c: int for c in ("seed", "images", "params", "macs")})
    except (OSError, ValueError, OverflowError) as e:
        raise UsageError(
            f"{target} is damaged ({str(e)[:120]}); delete it and run the same command again: what is recorded is not trained again"
        ) from None


def _merged(
    earlier: pd.DataFrame, table: pd.DataFrame, plan: Comparison, like: Sequence[str]
) -> pd.DataFrame:
    """Rows of earlier calls and new ones, which replace all that are alike in these columns, and those of other seeds at another rate; in
    the order of the file."""
    new = pd.MultiIndex.from_frame(table[like])
    kept = earlier[~pd.MultiIndex.from_frame(earlier[like]).isin(new)]
    run = ["method", "keep_ratio", "images"]
    rates = table.drop_duplicates(run).set_index(run)["lr"]
    now = rates.reindex(pd.MultiIndex.from_frame(kept[run])).to_numpy()
    kept = kept[np.isnan(now) | (now == kept["lr"])]
    both = pd.concat([t for t in (kept, table) if len(t)], ignore_index=True)
    both = both[both["method"].isin(plan.methods)]
    place = {m: i for i, m in enumerate(plan.methods)}
    order = both.assign(m=both["method"].map(place)).sort_values(["keep_ratio", "m", "images", "seed"])
    return order.drop(columns="m").reset_index(drop=True)


def _as_csv(table: pd.DataFrame) -> bytes:
    """What is measured with six digits; what rows are found by with all of its digits."""
    exact = {c: table[c].map(lambda x: repr(float(x))) for c in ("keep_ratio", "lr")}
    return table.assign(**exact).to_csv(index=False, float_format="%.6g").encode()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over seeds, a row a method and keep_ratio, best first."""
    grouped = table.groupby(["keep_ratio", "method"], sort=False)
    columns = {
        "seeds": grouped["seed"].nunique(),
        "lr": grouped["lr"].first(),
        "val_mean": grouped["val_accuracy"].mean(),
        "val_std": grouped["val_accuracy"].std(),
        "test_mean": grouped["test_accuracy"].mean(),
        "test_std": grouped["test_accuracy"].std(),
        "start_mean": grouped["start_accuracy"].mean(),
        "params": grouped["params"].first(),
        "macs": grouped["macs"].first(),
        "seconds": grouped["seconds"].mean(),
    }
    found = pd.DataFrame(columns).reset_index()
    return found.sort_values(["keep_ratio", "val_mean"], ascending=False, ignore_index=True)


def settings_by_method(name: str, preset: str, key: str, root: Path | None = None) -> dict[str, Any]:
    """By method of a comparison what it sets `key` to, one of `Settings`, where only the experiment or the default says so too."""
    root = root or project_root()
    plan = load_comparison(name, root)
    first = plan.first_lr, plan.keep_ratios[0], plan.seeds[0]
    return {m.method: getattr(m._settings(*first), key) for m in _chosen(name, preset, root, ())}


def original(name: str, preset: str, root: Path | None = None) -> dict[str, float]:
    """The network that all methods of a comparison begin with: params, macs, and val_accuracy and test_accuracy in percent."""
    from alphaprune.method_result import of_original

    return of_original(Experiment(preset, name, root or project_root()))


def leads(summary: pd.DataFrame, original_accuracy: float) -> pd.DataFrame:
    """The best method of each family, chosen by validation, and what ours is ahead of it on the test images.

    Args:
        summary: as `summary` gives it.
        original_accuracy: of the network they begin with, test images, percent.

    Returns:
        A row a keep_ratio and family: method, test_mean, test_std, `lost` against the original, and `ours_ahead`, points.
    """
    rows = []
    for ratio, own in summary.groupby("keep_ratio", sort=False):
        family = own["method"].str.extract(r"^([a-z-]+)", expand=False)
        best = own.loc[own.groupby(family, sort=False)["val_mean"].idxmax()]
        ours = best[best["method"].str.startswith("alphaprune")]["test_mean"]
        for row in best.sort_values("test_mean", ascending=False).itertuples():
            rows.append(
                {
                    "keep_ratio": ratio,
                    "method": row.method,
                    "test_mean": row.test_mean,
                    "test_std": row.test_std,
                    "lost": original_accuracy - row.test_mean,
                    "ours_ahead": ours.iloc[0] - row.test_mean if len(ours) else float("nan"),
                }
            )
    return pd.DataFrame(rows)


def curves(name: str, preset: str, table: pd.DataFrame, root: Path | None = None) -> pd.DataFrame:
    """What was measured while the methods of a table trained, first seed and budget, from the records.

    Returns:
        Rows of `Experiment.curves`, with the columns `method` and `images`, the number seen so far.
    """
    parts = []
    for _, row in table.groupby(["method", "keep_ratio"], sort=False).first().reset_index().iterrows():
        of = experiment(
            name,
            preset,
            row["method"],
            float(row["lr"]),
            float(row["keep_ratio"]),
            int(row["seed"]),
            root=root,
        )
        found = of.curves().assign(method=row["method"], keep_ratio=row["keep_ratio"])
        found["images"] = (found["start"] + found["step"]) * of.settings.batch_size
        parts.append(found)
    return pd.concat(parts, ignore_index=True)


def provenance(
    name: str, preset: str, table: pd.DataFrame, budgets: bool = False, root: Path | None = None
) -> dict[str, Any]:
    """What figures of a table that `compare` gave were made from, in the form of `alphaprune.provenance`; `budgets` as it was there."""
    root = root or project_root()
    plan = load_comparison(name, root)
    rows = table[["method", "lr", "keep_ratio", "seed"]].drop_duplicates()
    of = [
        experiment(name, preset, r.method, float(r.lr), float(r.keep_ratio), int(r.seed), budget, root)
        for r in rows.itertuples()
        for budget in ((1.0, *plan.budgets) if budgets else (1.0,))
    ]
    found = merged(e.provenance() for e in of)
    command = f"python -m alphaprune.comparison {name} {preset}{' --budgets' if budgets else ''}"
    return found | {"command": [command], "parameters": sorted([f"params/{name}.yaml", *found["parameters"]])}


def _search(method: _Method, keep_ratio: float, begin: float) -> tuple[float, str]:
    """The best learning rate and all that were tried, with the first seed."""
    plan = load_comparison(method.name, method.root)
    # What cannot be is said before anything trains.
    for ratio in plan.keep_ratios if keep_ratio == plan.keep_ratios[0] else ():
        method.of(plan.first_lr, ratio, plan.seeds[0])
    tried: dict[float, float] = {}

    def reached(lr: float) -> float:
        if lr not in tried:
            tried[lr] = _reached(method.train(lr, keep_ratio, plan.seeds[0]))
        return tried[lr]

    best = climb(sorted(plan.lrs), begin, reached)
    return best, " ".join(f"{x:g}" for x in sorted(tried))


def _reached(of: Experiment) -> float:
    return of.record(of.stages[-1].name)["metrics"]["val_accuracy"]


def _run(
    method: _Method,
    lr: float,
    searched: str,
    keep_ratio: float,
    seeds: tuple[int, ...],
    budget: float,
) -> list[dict[str, Any]]:
    """All seeds of a method at a keep_ratio and budget, with the rate that was found."""
    from alphaprune.method_result import (
        of_trained,  # brings torch, which what is wrong with the input need not wait for
    )

    shared = {"method": method.method, "keep_ratio": keep_ratio, "lr": lr, "searched": searched}
    return [
        shared | {"seed": seed} | of_trained(method.train(lr, keep_ratio, seed, budget, finals=True))
        for seed in seeds
    ]


def climb(grid: Sequence[float], first: float, reached: Callable[[float], float]) -> float:
    """The value of a grid that is better than both its neighbours, found by climbing from `first`."""
    i = grid.index(first)
    while True:
        around = [j for j in (i, i - 1, i + 1) if 0 <= j < len(grid)]
        best = max(around, key=lambda j: reached(grid[j]))
        if best == i:
            return grid[i]
        i = best


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m alphaprune.comparison", description="Run several methods on the same images."
    )
    parser.add_argument("name", nargs="+", help="a file in params/, such as controls")
    parser.add_argument("preset")
    parser.add_argument("--method", action="append", default=[], help="only this; may be given several times")
    parser.add_argument("--keep-ratio", action="append", default=[], type=float)
    parser.add_argument("--seed", action="append", default=[], type=int)
    parser.add_argument("--jobs", type=int, default=1, help="methods at once")
    parser.add_argument(
        "--budgets", action="store_true", help="the file's further budgets, first seed and ratio"
    )
    parser.add_argument(
        "--why", action="store_true", help="train nothing; say what would be trained, and why"
    )
    args = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        with ending_with_a_line():
            for name in args.name:
                asked = (name, args.preset, None, args.method, args.keep_ratio, args.seed)
                if args.why:
                    print(*reasons(*asked, args.budgets), sep="\n")
                    continue
                table = compare(*asked, args.jobs, args.budgets, say)
                shown = table if args.budgets else summary(table)
                print(shown.to_string(index=False, float_format="{:.4g}".format))
    except UsageError as e:
        print(f"alphaprune: {e}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
